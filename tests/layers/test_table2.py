"""ECA-Net's Table 2 and supplement B: parameter counts as printed, and each module as one matrix in float64."""

import pytest
import timm
import torch
from torch import nn

from timm_eca import get_attn

WIDTHS = (16, 64, 256, 2048)

# Weights of a module as a function of the channels C, from Table 2 (r = 16) and supplement B.
FORMULAS = {
    "se_paper": lambda c: 2 * c * c // 16,
    "se_var1": lambda c: 0,
    "se_var2": lambda c: c,
    "se_var3": lambda c: c * c,
    "se_gc1": lambda c: c * c // 16,
    "se_gc2": lambda c: 16 * c,
    "se_gc3": lambda c: 8 * c,
    "eca_ns": lambda c: {16: 3, 64: 3, 256: 5, 2048: 7}[c] * c,
    "eca": lambda c: {16: 3, 64: 3, 256: 5, 2048: 7}[c],
    "eca_k3": lambda c: 3,
    "eca2": lambda c: 2 * {16: 3, 64: 3, 256: 5, 2048: 7}[c],
    "eca3": lambda c: 3 * {16: 3, 64: 3, 256: 5, 2048: 7}[c],
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("channels", WIDTHS)
def test_parameters(name, channels):
    layer = get_attn(name)(channels, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == FORMULAS[name](channels)


def test_parameters_of_the_variants_with_arguments():
    assert sum(p.numel() for p in get_attn("se_paper")(64, reduction=8).parameters()) == 2 * 64 * 64 // 8
    assert sum(p.numel() for p in get_attn("eca_ns")(64, kernel_size=3).parameters()) == 3 * 64
    assert sum(p.numel() for p in get_attn("eca2")(64, kernel_size=5).parameters()) == 10


def diagonal(layer, channels):
    return torch.diag(layer.weight)


def full(layer, channels):
    return layer.fc.weight


def block_diagonal(layer, channels):
    return torch.block_diag(*layer.conv.weight.squeeze(-1).chunk(layer.conv.groups))


def band(rows, channels):
    """Row i holds its weights at columns i - k // 2 to i + k // 2, as far as they exist (Eq. 6)."""
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, weight in enumerate(row):
            column = i + j - len(row) // 2
            if 0 <= column < channels:
                matrix[i, column] = weight
    return matrix


def own_band(layer, channels):
    return band(layer.conv.weight[:, 0].tolist(), channels)


def toeplitz_band(layer, channels):
    return band([layer.conv.weight.flatten().tolist()] * channels, channels)


def product_of_bands(layer, channels):
    bands = [band([conv.weight.flatten().tolist()] * channels, channels) for conv in layer.convs]
    matrix = torch.eye(channels, dtype=torch.float64)
    for one in bands:
        matrix = one @ matrix
    return matrix


MATRICES = {
    "se_var1": lambda layer, channels: torch.eye(channels, dtype=torch.float64),
    "se_var2": diagonal,
    "se_var3": full,
    "se_gc1": block_diagonal,
    "se_gc2": block_diagonal,
    "se_gc3": block_diagonal,
    "eca_ns": own_band,
    "eca": toeplitz_band,
    "eca_k3": toeplitz_band,
    "eca2": product_of_bands,
    "eca3": product_of_bands,
}
NONZERO = {
    "se_var1": 48,
    "se_var2": 48,
    "se_var3": 48 * 48,
    "se_gc1": 48 * 3,
    "se_gc2": 48 * 16,
    "se_gc3": 48 * 8,
    "eca_ns": 3 * 48 - 2,
    "eca": 3 * 48 - 2,
    "eca_k3": 3 * 48 - 2,
    "eca2": 5 * 48 - 6,
    "eca3": 7 * 48 - 12,
}


def gated(x, matrix):
    x = x.double()
    pooled = x.flatten(2).sum(-1) / (x.shape[2] * x.shape[3])
    return x / (1 + torch.exp(-(pooled @ matrix.double().T)))[..., None, None]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_matrix(name, dtype):
    torch.manual_seed(0)
    layer = get_attn(name)(48).to(dtype)
    matrix = MATRICES[name](layer, 48)
    assert (matrix != 0).sum() == NONZERO[name]
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 48, 5, 4, dtype=dtype).contiguous(memory_format=memory_format)
        out = layer(x)
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out.double(), gated(x, matrix), rtol=tolerance, atol=tolerance)


def test_se_paper():
    torch.manual_seed(0)
    layer = get_attn("se_paper")(48, reduction=8).double()
    x = torch.randn(3, 48, 5, 4, dtype=torch.float64)
    hidden = (x.mean((2, 3)) @ layer.fc1.weight.T).clamp(min=0)
    expected = x * torch.sigmoid(hidden @ layer.fc2.weight.T)[..., None, None]
    assert layer.fc1.weight.shape == (6, 48)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_eca_ns_loads_the_authors_weight():
    layer = get_attn("eca_ns")(4, kernel_size=3)
    layer.load_state_dict({"conv.weight": torch.arange(12.0).view(4, 1, 3)})
    # Rows (0 1 2), (3 4 5), (6 7 8), (9 10 11) over the channel and its two neighbours, zero outside.
    y = torch.tensor([1.0, -1.0, 2.0, 0.5])
    expected = torch.tensor([[1 * 1 - 2 * 1, 3 * 1 - 4 * 1 + 5 * 2, -6 * 1 + 7 * 2 + 8 * 0.5, 9 * 2 + 10 * 0.5]])
    torch.testing.assert_close(layer.logits(y[None]), expected)


def test_stack_with_an_activation():
    torch.manual_seed(0)
    layer = get_attn("eca2")(8, kernel_size=3, inner_act_layer="relu").double()
    y = torch.randn(2, 8, dtype=torch.float64)
    first, second = (band([conv.weight.flatten().tolist()] * 8, 8) for conv in layer.convs)
    torch.testing.assert_close(layer.logits(y), (y @ first.T).clamp(min=0) @ second.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("se_paper", {"reduction": 0}, "reduction must be a positive integer, got 0"),
        ("se_gc1", {"channels": 24}, "groups must divide channels, 24, got 16"),
        ("se_gc2", {"channels": 24}, "group_size must divide channels, 24, got 16"),
        ("se_gc1", {"group_size": 8}, "needs groups or group_size, got groups=16, group_size=8"),
        ("eca_ns", {"kernel_size": 4}, "kernel_size must be an odd positive integer"),
        ("eca2", {"kernel_size": 2}, "kernel_size must be an odd positive integer"),
        ("eca2", {"depth": 0}, "depth must be a positive integer, got 0"),
        ("se_var2", {"channels": 0}, "channels must be a positive integer, got 0"),
    ],
)
def test_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_attn(name)(**{"channels": 32, **kwargs})


@pytest.mark.parametrize("name", FORMULAS)
def test_in_a_model_and_in_create_attn(name):
    assert isinstance(timm.layers.create_attn(name, 64), nn.Module)
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=2)
    model = timm.create_model("resnet18", attn_layer=name, num_classes=2)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    one = {c: sum(p.numel() for p in get_attn(name)(c).parameters()) for c in (64, 128, 256, 512)}
    assert added == 2 * sum(one.values())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refuses_activation():
    with pytest.raises(ValueError, match="inner_act_layer must be the name of a timm activation"):
        get_attn("eca2")(64, inner_act_layer="nonsense")

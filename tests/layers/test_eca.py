import copy

import pytest
import torch
from timm.layers import EcaModule
from torch import nn

from timm_eca import EcaLayer, adaptive_kernel_size


def band_matrix(kernel: torch.Tensor, channels: int) -> torch.Tensor:
    """The C x C band matrix of Eq. 6 with the shared weights of Eq. 7, in float64."""
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    k = kernel.numel()
    for row in range(channels):
        for j in range(k):
            column = row + j - k // 2
            if 0 <= column < channels:
                matrix[row, column] = kernel.flatten()[j].double()
    return matrix


def oracle(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Eq. 9 as a matrix product in float64."""
    x = x.double()
    pooled = x.flatten(2).sum(-1) / (x.shape[2] * x.shape[3])
    gate = 1 / (1 + torch.exp(-(pooled @ band_matrix(kernel, x.shape[1]).T)))
    return x * gate[..., None, None]


def test_hand_computed():
    layer = EcaLayer(kernel_size=3)
    layer.conv.weight.data = torch.tensor([[[1.0, 2.0, -1.0]]])
    x = torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1)
    # Rows of the band matrix: (2, -1, 0), (1, 2, -1), (0, 1, 2), so the convolved vector is 2, -1, 4.
    expected = torch.tensor([1 * 0.8807970779778823, 0.0, 2 * 0.9820137900379085]).view(1, 3, 1, 1)
    torch.testing.assert_close(layer(x), expected)


class TestAdaptiveKernelSize:
    @pytest.mark.parametrize(
        ("channels", "expected"),
        [(8, 3), (16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7), (4096, 7)],
    )
    def test_hand_computed(self, channels, expected):
        assert adaptive_kernel_size(channels) == expected

    @pytest.mark.parametrize(("gamma", "beta"), [(2, 1), (1, 1), (2, 4), (3, 0.5)])
    def test_nearest_odd_number_ties_up(self, gamma, beta):
        from math import log2

        for channels in range(8, 4097):
            t = abs(log2(channels) / gamma + beta / gamma)
            nearest = min(range(1, 31, 2), key=lambda odd: (round(abs(odd - t), 12), -odd))
            assert adaptive_kernel_size(channels, gamma, beta) == max(nearest, 3), channels

    def test_same_as_timm(self):
        for channels in range(1, 4097):
            assert adaptive_kernel_size(channels) == EcaModule(channels, device="meta").conv.kernel_size[0], channels

    @pytest.mark.parametrize("channels", [0, -8, 2.5, "64", True, None])
    def test_refuses_channels(self, channels):
        with pytest.raises(ValueError, match="channels must be a positive integer, got"):
            adaptive_kernel_size(channels)

    @pytest.mark.parametrize("gamma", [0, -1])
    def test_refuses_gamma(self, gamma):
        with pytest.raises(ValueError, match="gamma must be above 0, got"):
            adaptive_kernel_size(64, gamma)


class TestConstruction:
    @pytest.mark.parametrize(
        ("args", "k"),
        [
            ({"channels": 256}, 5),
            ({"channels": 256, "kernel_size": 9}, 9),
            ({"kernel_size": 1}, 1),
            ({"channels": 64, "gamma": 1, "beta": 1}, 7),
        ],
    )
    def test_state_dict_is_one_kernel(self, args, k):
        assert {n: tuple(p.shape) for n, p in EcaLayer(**args).state_dict().items()} == {"conv.weight": (1, 1, k)}

    @pytest.mark.parametrize("kernel_size", [0, 2, 4, -3, 3.0, 2.5, "3", True])
    def test_refuses_kernel_size(self, kernel_size):
        with pytest.raises(ValueError, match=r"kernel_size must be an odd positive integer .* got"):
            EcaLayer(64, kernel_size=kernel_size)

    def test_needs_channels_or_kernel_size(self):
        with pytest.raises(ValueError, match=r"needs channels .* or kernel_size, got neither"):
            EcaLayer()

    @pytest.mark.parametrize("gate_layer", ["sigmiod", None, "", 3, nn.Sigmoid()])
    def test_refuses_gate(self, gate_layer):
        with pytest.raises(ValueError, match="gate_layer must be the name of a timm activation"):
            EcaLayer(64, gate_layer=gate_layer)

    @pytest.mark.parametrize("value", ["2", None, float("nan"), float("inf"), True])
    @pytest.mark.parametrize("name", ["gamma", "beta"])
    def test_refuses_numbers_of_the_formula(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got {value!r}"):
            EcaLayer(64, **{name: value})

    def test_takes_what_timm_passes(self):
        layer = EcaLayer(64, act_layer=nn.ReLU, rd_ratio=0.25, rd_channels=16, rd_divisor=8, bias=False)
        assert layer.conv.bias is None

    def test_refuses_a_typo(self):
        with pytest.raises(TypeError, match="kernel_sise"):
            EcaLayer(64, kernel_sise=3)

    def test_device_and_dtype(self):
        weight = EcaLayer(64, device="meta", dtype=torch.bfloat16).conv.weight
        assert weight.is_meta
        assert weight.dtype is torch.bfloat16

    def test_timm_checkpoint_loads(self):
        for channels in (4, 64, 2048):
            theirs, ours = EcaModule(channels), EcaLayer(channels)
            ours.load_state_dict(theirs.state_dict())
            x = torch.randn(2, channels, 5, 7)
            assert torch.equal(ours(x), theirs(x))


SHAPES = [(1, 1, 1, 1), (1, 8, 1, 1), (3, 16, 1, 9), (2, 5, 7, 3), (2, 64, 8, 8), (4, 129, 13, 11)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class TestForward:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("kernel_size", [None, 1, 3, 9])
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_band_matrix(self, shape, kernel_size, dtype, memory_format):
        torch.manual_seed(0)
        layer = EcaLayer(shape[1], kernel_size, dtype=dtype)
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
        before = x.clone()
        out = layer(x)
        assert torch.equal(x, before)
        assert (out.dtype, out.shape) == (dtype, x.shape)
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(
            out.double(), oracle(x, layer.conv.weight), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
        )

    def test_gradients(self):
        torch.manual_seed(0)
        layer = EcaLayer(kernel_size=5, dtype=torch.float64)
        x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
        cotangent = torch.randn(2, 6, 3, 2, dtype=torch.float64)
        inputs = (x, layer.conv.weight)
        ours = torch.autograd.grad((layer(x) * cotangent).sum(), inputs)
        kernel = layer.conv.weight.detach().clone().requires_grad_()
        bands = sum(torch.diag(kernel[0, 0, j].expand(6 - abs(j - 2)), j - 2) for j in range(5))
        gated = x * torch.sigmoid(x.mean((2, 3)) @ bands.T)[..., None, None]
        for a, b in zip(ours, torch.autograd.grad((gated * cotangent).sum(), (x, kernel))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype):
        torch.manual_seed(0)
        layer, x = EcaLayer(32), torch.randn(2, 32, 4, 4)
        with torch.autocast("cpu", dtype):
            out = layer(x)
        torch.testing.assert_close(out.double(), oracle(x, layer.conv.weight), rtol=2e-2, atol=2e-2)

    def test_empty_batch(self):
        assert EcaLayer(8)(torch.randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)

    def test_other_gate(self):
        layer = EcaLayer(8, gate_layer="hard_sigmoid")
        x = torch.randn(2, 8, 3, 3)
        y = x.mean((2, 3)).double() @ band_matrix(layer.conv.weight, 8).T
        torch.testing.assert_close(layer.channel_weights(x).double(), ((y + 3) / 6).clamp(0, 1), rtol=1e-5, atol=1e-6)


def _script(layer, x):
    return torch.jit.script(layer)


def _trace(layer, x):
    return torch.jit.trace(layer, x)


def _fx(layer, x):
    return torch.fx.symbolic_trace(layer)


def _export(layer, x):
    dim = torch.export.Dim
    shapes = {"x": {0: dim("batch"), 2: dim("height"), 3: dim("width")}}
    return torch.export.export(layer, (x,), dynamic_shapes=shapes).module()


def _compile(layer, x):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True)


@pytest.mark.parametrize("transform", [_script, _trace, _fx, _export, _compile])
def test_same_through(transform):
    torch.manual_seed(0)
    layer = EcaLayer(32).eval()
    other = transform(layer, torch.randn(2, 32, 6, 5))
    for shape in [(2, 32, 6, 5), (5, 32, 9, 4), (3, 32, 14, 14)]:
        x = torch.randn(shape)
        torch.testing.assert_close(other(x), layer(x), rtol=1e-6, atol=1e-6)


class TestIdentityInit:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_undone_by_its_factor(self, dtype):
        layer = EcaLayer(16, dtype=dtype)
        factor = layer.identity_init_()
        x = torch.randn(2, 16, 5, 5, dtype=dtype)
        assert factor == 2
        assert torch.equal(layer(x * factor), x)

    def test_kernel_has_a_gradient(self):
        layer = EcaLayer(16, kernel_size=5)
        layer.identity_init_()
        layer(torch.randn(2, 16, 5, 5)).square().sum().backward()
        assert (layer.conv.weight.grad != 0).all()

    def test_refuses_gate_without_a_constant(self):
        layer = EcaLayer(16, gate_layer="tanh")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="power of two"):
            layer.identity_init_()
        assert torch.equal(layer.conv.weight, before["conv.weight"])

"""The systems that ECA-Net is compared with, each against its paper's formula written out in float64."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_eca import get_attn
from timm_eca.layers.gsop import covariance

COMPARED = ("a2", "aa", "da", "eca_spatial", "ge_theta_plus", "gsop", "nl_paper", "scse")


def fresh(name, *args, **kwargs):
    """A layer in float64 in eval mode, all parameters away from special values."""
    torch.manual_seed(0)
    layer = get_attn(name)(*args, **kwargs).double().eval()
    for p in layer.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return layer


def array(t):
    return t.detach().double().numpy()


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def softmax(t, axis):
    e = np.exp(t)
    return e / e.sum(axis, keepdims=True)


def conv1x1(conv, x):
    """A 1x1 convolution of one sample of shape (C, N) as a matrix product."""
    out = array(conv.weight)[:, :, 0, 0] @ x
    return out if conv.bias is None else out + array(conv.bias)[:, None]


def norm(bn, x):
    """A norm with fresh running statistics: mean 0, variance 1."""
    return x / math.sqrt(1 + bn.eps) * array(bn.weight)[:, None] + array(bn.bias)[:, None]


def assert_is(out, expected):
    np.testing.assert_allclose(array(out), expected, rtol=1e-10, atol=1e-12)


def sample(channels, height=4, width=3):
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a2():
    layer, x = fresh("a2", 8, reduction=2), sample(8)
    for got, one in zip(layer(x), array(x.flatten(2))):
        features, gather, distribute = (conv1x1(c, one) for c in (layer.phi, layer.theta, layer.rho))
        gather, distribute = softmax(gather, 1), softmax(distribute, 0)
        descriptors = np.stack([sum(g[p] * features[:, p] for p in range(12)) for g in gather], 1)  # (m, n)
        z = np.stack([descriptors @ distribute[:, p] for p in range(12)], 1)
        assert_is(got.flatten(1), one + conv1x1(layer.expand, z))


def test_gsop():
    layer, x = fresh("gsop", 6, reduced_channels=4), sample(6)
    for got, one in zip(layer(x), array(x.flatten(2))):
        reduced = np.maximum(norm(layer.norm, conv1x1(layer.reduce, one)), 0)
        covariances = norm(layer.row_norm, np.cov(reduced, bias=True))
        rows = array(layer.row_conv.weight)[:, 0].reshape(4, 4, 4)  # row, output, column
        mixed = np.einsum("roc,rc->ro", rows, covariances).reshape(-1) + array(layer.row_conv.bias)
        gate = sigmoid(array(layer.expand.weight)[:, :, 0] @ mixed + array(layer.expand.bias))
        assert_is(got.flatten(1), one * gate[:, None])


def test_scse():
    layer, x = fresh("scse", 6), sample(6)
    for got, one in zip(layer(x), array(x.flatten(2))):
        hidden = np.maximum(array(layer.fc1.weight) @ one.mean(1) + array(layer.fc1.bias), 0)
        channel = sigmoid(array(layer.fc2.weight) @ hidden + array(layer.fc2.bias))
        spatial = sigmoid(array(layer.spatial.weight).reshape(6) @ one)
        assert_is(got.flatten(1), one * channel[:, None] + one * spatial[None])
    assert layer.fc1.out_features == 3


def test_da():
    layer, x = fresh("da", 6, reduction=2), sample(6)
    for got, one in zip(layer(x), array(x.flatten(2))):
        query, key, value = (conv1x1(c, one) for c in (layer.query, layer.key, layer.value))
        position = np.zeros_like(one)
        for j in range(12):
            weights = np.array([math.exp(query[:, j] @ key[:, i]) for i in range(12)])
            position[:, j] = value @ (weights / weights.sum())
        channel = np.zeros_like(one)
        for j in range(6):
            weights = np.array([math.exp(one[j] @ one[i]) for i in range(6)])
            channel[j] = (weights / weights.sum()) @ one
        assert_is(got.flatten(1), one + array(layer.alpha) * position + array(layer.beta) * channel)


@pytest.mark.parametrize("under_autocast", [True, False])
def test_da_in_half_precision(under_autocast):
    """x x^T of 3136 positions does not fit float16."""
    x = torch.randn(1, 16, 56, 56).relu() * 8
    layer, half = get_attn("da")(16), x.half()
    with torch.autocast("cpu", torch.float16, enabled=under_autocast):
        out = layer.channel(half)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), layer.channel(half.double()), rtol=1e-3, atol=1e-3)


def test_da_starts_as_the_identity():
    x = sample(16)
    assert torch.equal(get_attn("da")(16).double()(x), x)


def strided_depthwise(weight, x):
    """A depthwise 3x3 convolution of stride 2 with zero padding 1, by its definition; x of shape (C, H, W)."""
    channels, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((channels, (height + 1) // 2, (width + 1) // 2))
    for c in range(channels):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = (padded[c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * weight[c, 0]).sum()
    return out


@pytest.mark.parametrize("extent", [2, 4])
def test_ge_theta_plus(extent):
    layer, x = fresh("ge_theta_plus", 6, extent=extent, reduction=3), sample(6, 8, 4)
    stages = [m for m in layer.gather if isinstance(m, nn.Sequential)]
    assert len(stages) == {2: 1, 4: 2}[extent]
    for got, one in zip(layer(x), array(x)):
        y = one
        for index, (conv, bn) in enumerate(stages):
            y = np.maximum(y, 0) if index else y
            shape = strided_depthwise(array(conv.weight), y)
            y = norm(bn, shape.reshape(6, -1)).reshape(shape.shape)
        gate = conv1x1(layer.fc2, np.maximum(conv1x1(layer.fc1, y.reshape(6, -1)), 0)).reshape(y.shape)
        nearest = gate.repeat(8 // y.shape[1], 1).repeat(4 // y.shape[2], 2)
        assert_is(got, one * sigmoid(nearest))


def test_ge_theta_plus_global():
    layer, x = fresh("ge_theta_plus", 6, feat_size=(4, 3), reduction=3), sample(6)
    conv, bn = layer.gather[0]
    for got, one in zip(layer(x), array(x)):
        y = norm(bn, (one * array(conv.weight)[:, 0]).sum((1, 2))[:, None])
        gate = sigmoid(conv1x1(layer.fc2, np.maximum(conv1x1(layer.fc1, y), 0)))
        assert_is(got, one * gate[:, :, None])
    with pytest.raises(ValueError, match=r"must be of feat_size \(4, 3\), got \(5, 3\)"):
        layer(sample(6, 5, 3))


@pytest.mark.parametrize("feat_size", [None, (4, 3)])
def test_aa(feat_size):
    layer = fresh("aa", 6, 12, num_heads=2, min_key_dim=3, value_ratio=0.34, feat_size=feat_size)
    x = sample(6)
    positions = [(row, column) for row in range(4) for column in range(3)]
    assert layer.widths == (6, 6, 4)
    for got, one in zip(layer(x), array(x.flatten(2))):
        qkv = conv1x1(layer.qkv, one)
        heads = []
        for head in range(2):
            q, k = qkv[3 * head : 3 * head + 3], qkv[6 + 3 * head : 9 + 3 * head]
            v = qkv[12 + 2 * head : 14 + 2 * head]
            logits = np.zeros((12, 12))
            for i, (iy, ix) in enumerate(positions):
                for j, (jy, jx) in enumerate(positions):
                    logits[i, j] = q[:, i] @ k[:, j]
                    if feat_size:
                        relative = array(layer.rel_width)[jx - ix + 2] + array(layer.rel_height)[jy - iy + 3]
                        logits[i, j] += q[:, i] @ relative
            heads.append(v @ softmax(logits / math.sqrt(3), 1).T)
        attention = conv1x1(layer.proj, np.concatenate(heads))
        assert_is(got[8:].flatten(1), attention)
    torch.testing.assert_close(layer(x)[:, :8], nn.functional.conv2d(x, layer.conv.weight, padding=1))


@pytest.mark.parametrize("size", [7, 8])
def test_aa_with_stride(size):
    layer = fresh("aa", 8, 16, stride=2, num_heads=1, feat_size=(4, 4))
    assert layer(sample(8, size, size)).shape == (2, 16, 4, 4)
    with pytest.raises(ValueError, match=r"must be of feat_size \(4, 4\), got \(3, 3\)"):
        layer(sample(8, 6, 6))


def test_nl_paper():
    layer, x = fresh("nl_paper", 6), sample(6)
    assert layer.t.out_channels == 3
    for got, one in zip(layer(x), array(x.flatten(2))):
        theta, phi, g = (conv1x1(c, one) for c in (layer.t, layer.p, layer.g))
        y = np.zeros((3, 12))
        for i in range(12):
            weights = np.array([math.exp(theta[:, i] @ phi[:, j]) for j in range(12)])
            y[:, i] = g @ (weights / weights.sum())
        assert_is(got.flatten(1), norm(layer.norm, conv1x1(layer.z, y)) + one)


def test_nl_paper_starts_as_the_identity():
    x = sample(16)
    assert torch.equal(get_attn("nl_paper")(16).double()(x), x)


def test_eca_spatial():
    layer, x = fresh("eca_spatial", 8, kernel_size=3, spatial_kernel_size=3), sample(8)
    kernel = array(layer.channel.conv.weight).reshape(3)
    weight = array(layer.spatial.conv.conv.weight)[0]
    bn = layer.spatial.conv.bn
    for got, one in zip(layer(x), array(x)):
        pooled = np.pad(one.mean((1, 2)), 1)
        z = one * sigmoid(np.array([pooled[i : i + 3] @ kernel for i in range(8)]))[:, None, None]
        maps = np.pad(np.stack([z.mean(0), z.max(0)]), ((0, 0), (1, 1), (1, 1)))
        logits = np.array([[(maps[:, i : i + 3, j : j + 3] * weight).sum() for j in range(3)] for i in range(4)])
        assert_is(got, z * sigmoid(norm(bn, logits.reshape(1, -1)).reshape(4, 3)))


def test_timm_has_the_others():
    """CBAM, GC and NL keep timm's classes under timm's names."""
    for name in ("cbam", "gc", "nl"):
        assert get_attn(name).__module__.startswith("timm.")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100"])
@pytest.mark.parametrize("name", COMPARED)
def test_in_a_model_and_in_create_attn(name, backbone):
    assert isinstance(timm.layers.create_attn(name, 64), nn.Module)
    torch.manual_seed(0)
    model = timm.create_model(backbone, attn_layer=name, num_classes=2)
    out = model(torch.randn(2, 3, 32, 32))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("a2", {"reduction": 0}, "reduction must be a positive integer, got 0"),
        ("gsop", {"reduced_channels": -1}, "reduced_channels must be a positive integer, got -1"),
        ("ge_theta_plus", {"extent": 6}, "extent must be a power of two from 2 on, got 6"),
        ("ge_theta_plus", {"extent": 1}, "extent must be a power of two from 2 on, got 1"),
        ("aa", {"value_ratio": 1.0}, "value_ratio must leave channels to convolution"),
        ("aa", {"key_ratio": -0.1}, "key_ratio"),
        ("aa", {"kernel_size": 2}, "kernel_size must be an odd positive integer"),
        ("scse", {"channels": "64"}, "channels must be a positive integer, got '64'"),
        ("da", {"channels": True}, "channels must be a positive integer, got True"),
        ("eca_spatial", {"spatial_kernel_size": 6}, "spatial_kernel_size must be an odd positive integer"),
    ],
)
def test_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_attn(name)(**{"channels": 64, **kwargs})


@pytest.mark.parametrize("name", COMPARED)
def test_script_and_fx(name):
    layer, x = fresh(name, 16), sample(16, 8, 8)
    for made in (torch.jit.script(layer), torch.fx.symbolic_trace(layer)):
        assert_is(made(x), array(layer(x)))


@pytest.mark.parametrize("name", ["aa", "ge_theta_plus"])
def test_script_of_a_fixed_size(name):
    layer, x = fresh(name, 16, feat_size=(4, 3)), sample(16)
    scripted = torch.jit.script(layer)
    assert_is(scripted(x), array(layer(x)))
    with pytest.raises(torch.jit.Error, match=r"must be of feat_size \(4, 3\), got \(3, 4\)"):
        scripted(x.mT)


@pytest.mark.parametrize("name", COMPARED)
def test_device_and_dtype(name):
    layer = get_attn(name)(64, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("name", ["a2", "aa", "da", "eca_spatial", "ge_theta_plus", "scse"])
def test_empty_batch(name):
    assert get_attn(name)(16).eval()(torch.randn(0, 16, 8, 8)).shape == (0, 16, 8, 8)


def test_gsop_in_float16():
    """The sum over positions does not fit float16, their mean does."""
    x = 10 * torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(covariance(x.half()).float(), covariance(x), rtol=0.01, atol=0.2)


@pytest.mark.parametrize("feat_size", [7, (7,), (7, 0), (7.0, 7.0)])
@pytest.mark.parametrize("name", ["aa", "ge_theta_plus"])
def test_refuses_size(name, feat_size):
    with pytest.raises(ValueError, match="feat_size must be a height and a width"):
        get_attn(name)(16, feat_size=feat_size)

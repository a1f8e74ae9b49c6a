"""A norm that sums what it makes, against the mean of what the convolution after it makes of that."""

import pytest
import torch
from timm.layers import BlurPool2d
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn.utils import parametrize

from fused_models import ECA, blocks_of, create, pixels, plain_twin, small
from timm_eca.fused import blocks, native
from timm_eca.fused.blocks import RULES
from timm_eca.fused.formula import Act
from timm_eca.fused.halves import halves_of
from timm_eca.fused.norms import InnerNorm, NormPart
from timm_eca.fused.pooled import commutes, compiled_pool

pytestmark = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
SIZES = [(2, 8, 6, 5), (1, 3, 1, 1), (3, 5, 1, 4), (2, 16, 7, 1), (1, 70, 14, 14), (4, 24, 30, 31), (7, 37, 3, 2)]
CONVS = {
    "1x1": lambda channels, **kwargs: nn.Conv2d(channels, 2 * channels + 3, 1, **kwargs),
    "3x3": lambda channels, **kwargs: nn.Conv2d(channels, channels + 1, 3, padding=1, **kwargs),
}
ACTS = {Act.NONE: nn.Identity(), Act.RELU: nn.ReLU(), Act.RELU6: nn.ReLU6()}


def norm_of(channels: int, act: Act = Act.RELU, dtype: torch.dtype = torch.float64) -> InnerNorm:
    generator = torch.Generator().manual_seed(channels)
    module = nn.BatchNorm2d(channels).to(dtype).eval()
    for tensor in (module.weight, module.bias, module.running_mean):
        nn.init.normal_(tensor, std=3, generator=generator)
    nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
    return InnerNorm(NormPart(module, False, module._parameters, module._buffers), act, (module, ACTS[act]))


def map_of(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return made.to(dtype).contiguous(memory_format=layout)


def pool(norm: InnerNorm, conv: nn.Conv2d, z: torch.Tensor) -> torch.Tensor | None:
    *vectors, eps = norm.norm.given()
    return native.norm_pool(z, tuple(vectors), eps, norm.act, conv.weight, conv.bias)


@torch.no_grad()
def check(norm: InnerNorm, conv: nn.Conv2d, z: torch.Tensor, tolerance: float = 1e-12) -> None:
    u = norm.in_turn(z.clone(memory_format=torch.preserve_format))
    mean = conv(u).mean((2, 3))
    found = pool(norm, conv, z)
    torch.testing.assert_close(z, u, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, mean, rtol=tolerance, atol=tolerance * mean.abs().max().item())


@LAYOUTS
@pytest.mark.parametrize("kind", CONVS)
class TestOracle:
    @pytest.mark.parametrize("shape", SIZES, ids=str)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_sizes(self, shape, bias, kind, layout):
        check(norm_of(shape[1]), CONVS[kind](shape[1], bias=bias).double(), map_of(shape, layout))

    @pytest.mark.parametrize("act", Act)
    def test_activations(self, act, kind, layout):
        check(norm_of(16, act), CONVS[kind](16).double(), map_of((2, 16, 9, 7), layout))

    def test_weights_laid_out_otherwise(self, kind, layout):
        conv = CONVS[kind](16).double().to(memory_format=NHWC)
        check(norm_of(16), conv, map_of((2, 16, 9, 7), layout))

    def test_single_precision(self, kind, layout):
        conv = CONVS[kind](64)
        check(norm_of(64, dtype=torch.float32), conv, map_of((2, 64, 20, 20), layout, torch.float32), 1e-5)

    @pytest.mark.usefixtures("threads")
    @pytest.mark.parametrize("threads", [2, 3, 5], indirect=True)
    @pytest.mark.parametrize("batch", [1, 2, 6])
    def test_threads(self, batch, kind, layout):
        check(norm_of(33), CONVS[kind](33).double(), map_of((batch, 33, 40, 41), layout))

    def test_no_weights(self, kind, layout):
        norm = norm_of(8)
        norm.norm.affine.update(weight=None, bias=None)
        check(norm, CONVS[kind](8).double(), map_of((2, 8, 6, 5), layout))


class TestRefused:
    @pytest.mark.parametrize(
        ("z", "conv"),
        [
            (map_of((1, 4, 5, 5), NCHW, torch.bfloat16), nn.Conv2d(4, 8, 1).bfloat16()),
            (map_of((1, 4, 5, 5), NCHW, torch.bfloat16), nn.Conv2d(4, 8, 1)),
            (map_of((1, 4, 5, 5), NCHW), nn.Conv2d(4, 8, 1)),
            (map_of((1, 4, 5, 5), NCHW), nn.Conv2d(4, 8, 5, padding=2).double()),
            (map_of((1, 4, 5, 5), NCHW), nn.Conv2d(4, 8, (1, 3), padding=(0, 1)).double()),
            (map_of((1, 4, 5, 5), NCHW), nn.Conv2d(8, 8, 1).double()),
            (map_of((1, 4, 5, 10), NCHW)[..., ::2], nn.Conv2d(4, 8, 1).double()),
        ],
        ids=["bfloat16", "weights of float32", "weights of another type", "5x5", "1x3", "channels", "not dense"],
    )
    def test_by_the_passes(self, z, conv):
        norm, before = norm_of(4, dtype=z.dtype), z.clone()
        with torch.no_grad():
            assert pool(norm, conv, z) is None
        assert torch.equal(z, before)

    @pytest.mark.parametrize(
        "conv",
        [
            nn.Conv2d(4, 8, 1, stride=2),
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.Conv2d(4, 8, 1, padding=1),
            nn.Conv2d(4, 8, 3),
            nn.Conv2d(4, 8, 3, padding="same", dilation=2),
            nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(4, 8, 3, padding=1, groups=2),
            nn.Conv2d(4, 8, 5, padding=2),
        ],
        ids=["stride", "3x3 stride", "padding", "no padding", "dilation", "reflect", "groups", "5x5"],
    )
    def test_convolutions_that_do_not_commute(self, conv):
        assert not commutes(conv)

    @pytest.mark.parametrize("padding", [1, "same"])
    def test_those_that_do(self, padding):
        assert commutes(nn.Conv2d(4, 8, 3, padding=padding))

    @pytest.mark.parametrize(("batch", "width", "enough"), [(1, 35, 36), (4, 11, 12)])
    def test_weights_that_cost_more_than_the_map(self, batch, width, enough):
        norm, conv = norm_of(16), nn.Conv2d(16, 64, 1).double()
        with torch.no_grad():
            assert compiled_pool(norm, conv, map_of((batch, 16, 1, width), NCHW)) is None
            assert compiled_pool(norm, conv, map_of((batch, 16, 1, enough), NCHW)) is not None


@pytest.fixture
def sums(monkeypatch):
    """For each block whose norm was asked for sums, whether it had them."""
    found = []

    def watched(norm, conv, z):
        mean = compiled_pool(norm, conv, z)
        found.append(mean is not None)
        return mean

    monkeypatch.setattr(blocks, "compiled_pool", watched)
    return found


NETS = {
    "resnet18": {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 24)},
    "resnet26": {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 24)},
    "mobilenetv2_050": {},
    "efficientnet_es": {},
}


def net_of(name: str, **kwargs) -> nn.Module:
    return create(name, **NETS[name], **{**ECA, **kwargs}).double().eval()


def check_net(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = plain_twin(model)(x)
        assert (model(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


class TestBlocks:
    @LAYOUTS
    @pytest.mark.parametrize("name", NETS)
    def test_equal_the_plain_ones(self, sums, name, layout):
        model = net_of(name).to(memory_format=layout)
        check_net(model, pixels(2, 128).contiguous(memory_format=layout))
        assert len(sums) == len(blocks_of(model))
        assert any(sums)

    @pytest.mark.parametrize("name", ["resnet18", "resnet26"])
    def test_blur_between(self, sums, name):
        model = net_of(name, aa_layer=BlurPool2d)
        check_net(model, pixels(2, 128))
        assert len(sums) == sum(isinstance(block.aa, nn.Identity) for block in blocks_of(model))
        assert 0 < len(sums) < len(blocks_of(model))

    def test_something_between_from_now_on(self, sums):
        model = net_of("mobilenetv2_050")
        check_net(model, pixels(2, 64))
        sums.clear()
        for block in blocks_of(model):
            block.se = nn.Tanh()
        check_net(model, pixels(2, 64))
        assert not sums

    def test_a_hook_between(self, sums):
        model = net_of("mobilenetv2_050")
        for block in blocks_of(model):
            block.se.register_forward_hook(lambda *args: args[2] * 2)
        check_net(model, pixels(2, 64))
        assert not sums

    def test_a_convolution_that_changes(self, sums):
        model, x = small().double().eval(), pixels(2, 64)
        check_net(model, x)
        assert any(sums)
        sums.clear()
        for block in blocks_of(model):
            block.conv3.padding_mode, block.conv3.padding, block.conv3._reversed_padding_repeated_twice = (
                ("circular", (1, 1), (1, 1, 1, 1)) if block.downsample is None else ("zeros", (0, 0), (0, 0, 0, 0))
            )
            if block.downsample is None:
                block.conv3.weight = nn.Parameter(torch.nn.functional.pad(block.conv3.weight, (1, 1, 1, 1)))
                block.conv3.kernel_size = (3, 3)
        check_net(model, x)
        assert not all(sums)

    def test_a_parametrized_convolution(self, sums):
        class Doubled(nn.Module):
            def forward(self, weight):
                return 2 * weight

        model = small().double().eval()
        with torch.no_grad():
            model(pixels(2, 64))
        for block in blocks_of(model):
            parametrize.register_parametrization(block.conv3, "weight", Doubled())
        sums.clear()
        check_net(model, pixels(2, 64))
        assert not any(sums)

    @pytest.mark.parametrize("train", ["model", "last norm", "inner norm", "gradients"])
    def test_not_in_training(self, sums, train):
        model = small().double().train(train == "model")
        for block in blocks_of(model):
            block.bn3.train(train in ("model", "last norm"))
            block.bn2.train(train in ("model", "inner norm"))
        x = pixels(2, 64)
        plain = plain_twin(model)
        with torch.set_grad_enabled(train == "gradients"):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
        assert not sums

    def test_autocast(self, sums):
        model, x = small().eval(), pixels(2, 64, dtype=torch.float32)
        plain = plain_twin(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)
        assert sums
        assert not any(sums)


class Doubling(BasicBlock):
    """A forward that does something of its own before the last convolution."""

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = x * 2
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act2(x)
        return x


def test_a_forward_with_something_between_is_not_cut():
    rule = RULES["resnet:BasicBlock"]
    assert halves_of(BasicBlock, rule) is not None
    assert halves_of(Doubling, rule) is None

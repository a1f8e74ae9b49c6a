"""A map's mean from what a 1x1 convolution made it of."""

import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import nn

from fused_models import compiler_calls_blocks, pixels
from timm_eca import fuse_
from timm_eca.fused import blocks, forward, native, pooled
from timm_eca.fused.pooled import compiled_pool, pooled_before
from timm_eca.layers import EcaLayer

LAYOUTS = [torch.contiguous_format, torch.channels_last]
U = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Take small maps for large ones."""
    monkeypatch.setattr(pooled, "_LARGE", 0)


@pytest.fixture
def found(monkeypatch):
    """For each tail, whether the mean was found before its map was made."""
    found = []

    def watch(conv, u):
        found.append(pooled_before(conv, u))
        return found[-1]

    def watch_norm(norm, conv, z):
        mean = compiled_pool(norm, conv, z)
        found.extend([] if mean is None else [mean])
        return mean

    monkeypatch.setattr(forward, "pooled_before", watch)
    monkeypatch.setattr(blocks, "compiled_pool", watch_norm)
    return found


def block(stride: int = 1) -> nn.Module:
    """A bottleneck that quadruples its channels, its shortcut through a downsample."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(3, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    made = Bottleneck(3, 4, stride, down, attn_layer=EcaLayer)
    for p in made.parameters():
        nn.init.normal_(p)
    for norm in (made.bn3, down[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made.double().eval()


class TestMean:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("padding", [0, "same", "valid"])
    def test_is_the_maps(self, layout, bias, padding):
        conv = nn.Conv2d(4, 16, 1, padding=padding, bias=bias).double()
        u = U.contiguous(memory_format=layout)
        torch.testing.assert_close(pooled_before(conv, u), conv(u).mean((2, 3)), rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize(
        "conv",
        [
            nn.Conv2d(4, 16, 3, padding=1),
            nn.Conv2d(4, 16, 1, stride=2),
            nn.Conv2d(4, 16, 1, padding=1),
            nn.Conv2d(4, 16, 1, groups=2),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 64, 1).float(),
        ],
        ids=["3x3", "stride", "padding", "groups", "as wide", "other type"],
    )
    def test_left_to_the_map(self, conv):
        assert pooled_before(conv if conv.out_channels == 64 else conv.double(), U) is None

    def test_left_to_the_map_where_that_is_small(self, monkeypatch):
        conv = nn.Conv2d(4, 16, 1).double()
        assert pooled_before(conv, U[..., :3, :3]) is None  # the weights are as large
        monkeypatch.setattr(pooled, "_LARGE", 16 * 16 * 16 * len(U))
        assert pooled_before(conv, U) is not None
        assert pooled_before(conv, U[1:]) is None

    def test_left_to_the_map_where_it_is_rounded(self):
        assert pooled_before(nn.Conv2d(4, 16, 1).bfloat16(), U.bfloat16()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert pooled_before(nn.Conv2d(4, 16, 1), U.float()) is None


class TestBlocks:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
    def test_inference(self, engine, threads, found, layout):
        plain, x = block(), pixels(5, 16).contiguous(memory_format=layout)
        fused = fuse_(nn.Sequential(block()))
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
        assert [mean is not None for mean in found] == [True]

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
    def test_compiled(self, layout, backend):
        plain, x = block(), pixels(2, 92).contiguous(memory_format=layout)
        torch.compiler.reset()
        with torch.inference_mode():
            compiled = torch.compile(fuse_(nn.Sequential(block())), fullgraph=True, backend=backend)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-12, atol=1e-12)

    @compiler_calls_blocks
    @pytest.mark.parametrize("loaded", [True, False], ids=["library", "no library"])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
    def test_graph(self, monkeypatch, layout, loaded):
        """Where there is a library, its operators sum what the norm makes, or read z."""
        monkeypatch.setattr(native, "_loaded", native.loaded() and loaded)
        plain, x = block(), pixels(2, 92).contiguous(memory_format=layout)
        products = []

        def watch(graph, _):
            products.extend(node for node in graph.graph.nodes if "linear" in str(node.target))
            return graph.forward

        torch.compiler.reset()
        with torch.inference_mode():
            compiled = torch.compile(fuse_(nn.Sequential(block())), fullgraph=True, backend=watch)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-12, atol=1e-12)
        assert len(products) == (not native.loaded())

    def test_sizes_that_change(self):
        plain = block()
        torch.compiler.reset()
        with torch.inference_mode():
            compiled = torch.compile(fuse_(nn.Sequential(block())), fullgraph=True, dynamic=True)
            for size in (92, 16, 5, 96):
                x = pixels(2, size)
                torch.testing.assert_close(compiled(x), plain(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("change", ["gradients", "statistics of the batch"])
    def test_left(self, found, change):
        fused = fuse_(nn.Sequential(block().train(change == "statistics of the batch")))
        with torch.set_grad_enabled(change == "gradients"):
            fused(pixels(2, 16))
        assert found == []

    def test_weights_may_change(self, found):
        plain, x = block(), pixels(2, 16)
        fused = fuse_(nn.Sequential(block()))
        with torch.inference_mode():
            fused(x)
            for net in (plain, fused[0]):
                net.conv3.weight = nn.Parameter(net.conv3.weight * 2)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
        assert len(found) == 2

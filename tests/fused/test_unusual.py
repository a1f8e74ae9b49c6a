"""What is rare, and is to be as the plain path has it: saved tensors laid out anew, hooks in a new dictionary, ..."""

import copy

import pytest
import timm
import torch
from test_short_way import Doubled, check_inference
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_models import assert_same, blocks_of, compiler_calls_blocks, create, pixels, plain_twin, small, step
from timm_eca import unfuse_
from timm_eca.fused import gpu, native, passes
from timm_eca.fused.formula import Moments, TailWeights

ENGINES = {"native": native, "gpu": gpu, "passes": passes}
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@pytest.fixture
def norm_alone():
    """A block whose shortcut goes through a norm, and no convolution that would make a map of its own."""
    block = blocks_of(small())[2].double().train()
    block.downsample = nn.Sequential(nn.BatchNorm2d(block.conv1.in_channels)).double()
    return block


class TestInput:
    def map_for(self, block):
        return torch.randn(2, block.conv1.in_channels, 9, 9, dtype=torch.float64)

    def test_is_not_overwritten(self, norm_alone):
        x = self.map_for(norm_alone).requires_grad_()
        before = x.detach().clone()
        with torch.no_grad():
            norm_alone(x)
        assert torch.equal(x, before)

    def test_under_reentrant_checkpoints(self, norm_alone):
        given = self.map_for(norm_alone)

        def gradient(block):
            x = given.clone().requires_grad_()
            checkpoint(block, x.tanh(), use_reentrant=True).square().sum().backward()
            return x.grad

        plain = plain_twin(norm_alone)
        torch.testing.assert_close(gradient(norm_alone), gradient(plain))


@LAYOUTS
@pytest.mark.parametrize("way", ["with gaps", "the other layout"])
def test_saved_tensors_laid_out_anew(engine, way, layout):
    def unpack(t):
        if t.dim() != 4:
            return t
        return torch.stack([t, torch.full_like(t, 99)], -1)[..., 0] if way == "with gaps" else t.contiguous()

    model = small().double().train()
    x = pixels().contiguous(memory_format=layout)
    expected = step(plain_twin(model), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        assert_same(step(model, x), expected)


def test_evaluated_and_trained_before_one_backward(engine):
    """Statistics that the one call saved are updated by the other, which batch norm lets pass."""

    def gradient(model):
        x = pixels().requires_grad_()
        loss = model.eval()(x).square().sum() + model.train()(x).square().sum()
        return torch.autograd.grad(loss, x)[0]

    model = small().double()
    plain = plain_twin(model)
    made, expected = gradient(model), gradient(plain)
    # Batch norm takes the statistics as they are by then, not as they were; here the gate does too.
    assert (made - expected).abs().max() <= 0.05 * expected.abs().max()


class TestHalfPrecision:
    """By the passes of PyTorch: what cancels is not rounded before."""

    def tail(self, mean):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(4, 8, 14, 14, generator=generator) + mean
        kernel = torch.randn(1, 1, 3, generator=generator)
        return z, TailWeights(kernel, torch.sigmoid, torch.ones(8), torch.zeros(8), None, None, None, 1e-5)

    @pytest.mark.parametrize("inplace", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_large_means(self, dtype, inplace):
        z, weights = self.tail(mean=20)
        z = z.to(dtype)
        doubles = weights._replace(kernel=weights.kernel.double(), weight=None, bias=None)
        expected = passes.forward(z.double(), None, doubles, False, False)[0]
        given = z.clone()
        out = passes.forward(given, None, weights, False, inplace)[0]
        assert (out is given) == inplace
        off = (out.double() - expected).abs()
        assert (off <= torch.finfo(dtype).eps * expected.abs() + 1e-4).all(), "rounded more than once"

    def test_large_gradients(self):
        z, weights = self.tail(mean=100)
        moments = Moments(z.mean((0, 2, 3)), z.var((0, 2, 3)))
        grad = torch.full_like(z, 1000).half()
        made = passes.backward(grad, None, z.half(), z.mean((2, 3)), weights._replace(moments=moments), [True] * 6)
        assert all(gradient.isfinite().all() for gradient in made)


@LAYOUTS
def test_nan_in_the_output_lets_gradients_through(engine, layout):
    """As ReLU's derivative does."""
    z, out, grad = torch.randn(3, 2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    out = out.relu()
    out[0, 1, 2, 2] = torch.nan
    z, out, grad = (t.contiguous(memory_format=layout) for t in (z, out, grad))
    moments = Moments(torch.zeros(6), torch.ones(6))
    weights = TailWeights(torch.ones(1, 1, 3), torch.sigmoid, None, None, moments, None, None, 1e-5)
    masked = ENGINES[engine].backward(grad, out, z, z.mean((2, 3)), weights, [True] * 2 + [False] * 4)[1]
    assert torch.equal(masked, torch.where(out <= 0, 0, grad))
    assert masked[0, 1, 2, 2] == grad[0, 1, 2, 2] != 0


@LAYOUTS
def test_a_pixel_unlike_the_others(engine, layout):
    """Variances of maps with large means, where the pixel that the compiled passes start from is none of them."""
    z = 1000 + torch.randn(2, 4, 56, 56, generator=torch.Generator().manual_seed(0))
    z[:, :, 28, 0] = z[:, :, 0, 0] = 0
    weights = TailWeights(torch.ones(1, 1, 3), torch.sigmoid, None, None, None, None, None, 1e-5)
    _, _, moments = ENGINES[engine].forward(z.contiguous(memory_format=layout), None, weights, True, False)
    torch.testing.assert_close(moments[1].double(), z.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


class TestClasses:
    """A class that somebody made of a fused one, as FSDP's `fully_shard` does."""

    @pytest.fixture
    def wrapped(self):
        model = small().double()
        block = blocks_of(model)[1]
        block.__class__ = type("Wrapped", (type(block),), {})
        return model

    def test_computes(self, wrapped):
        x = pixels()
        copied = copy.deepcopy(wrapped)
        assert [type(b).__name__ for b in blocks_of(copied)].count("Wrapped") == 1
        assert_same(step(copied, x), step(wrapped, x))

    def test_is_not_unfused(self, wrapped):
        kinds = [type(block) for block in blocks_of(wrapped)]
        with pytest.raises(ValueError, match="have become Wrapped: call unfuse_ before"):
            unfuse_(wrapped)
        assert [type(block) for block in blocks_of(wrapped)] == kinds


def test_new_dictionary_of_hooks():
    model = small().double().eval()
    block, heard = blocks_of(model)[1], []
    x = pixels()
    with torch.no_grad():
        model(x)
        block.bn2._forward_hooks = type(block.bn2._forward_hooks)()
        block.bn2.register_forward_hook(lambda *_: heard.append(1))
        model(x)
    assert heard == [1]


class TestFrozenNorms:
    @pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
    def test_type_under_autocast(self, grad):
        """They make float32 of a map of half precision."""
        model = create("resnet18", attn_layer="eca", num_classes=7)
        model = timm.utils.freeze(model) or model
        plain = plain_twin(model)
        x = pixels(dtype=torch.float32)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            made, expected = (m.forward_intermediates(x, intermediates_only=True) for m in (model, plain))
        assert [t.dtype for t in made] == [t.dtype for t in expected]
        for own, other in zip(made, expected):
            torch.testing.assert_close(own, other, rtol=0, atol=0.03 * other.abs().max().item())


def test_class_of_its_own_in_the_shortcuts_norm():
    model = small().double().eval()
    norm = blocks_of(model)[0].downsample[-1]
    norm.weight = Doubled(norm.weight.detach())
    check_inference(model, pixels())


@compiler_calls_blocks
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiled_for_a_range_of_batches(train):
    """Nothing that decides between operators and loops may cut the range that was asked for."""
    block = create("resnet18", layers=(1, 1, 1, 1), attn_layer="eca").layer1[0].train(train)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64, 36, 36)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=15)
    with torch.set_grad_enabled(train):
        made, expected = compiled(x), plain_twin(block)(x)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@compiler_calls_blocks
def test_inference_mode_inside_a_graph():
    model = small().eval()
    x = pixels(size=64, dtype=torch.float32)

    def predict(x):
        with torch.inference_mode():
            return model(x)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(predict, backend="aot_eager")(x), predict(x), rtol=1e-4, atol=1e-5)


def test_tangents_in_a_graph():
    """Nothing is overwritten whose tangent is not."""
    block = blocks_of(small())[2].eval()
    x, v = torch.randn(2, 3, block.conv1.in_channels, 70, 70).unbind()

    def tangent(x, v):
        return torch.func.jvp(block, (x,), (v,))[1]

    torch._dynamo.reset()
    with torch.no_grad():
        expected = tangent(x, v)
        try:
            found = torch.compile(tangent, backend="aot_eager")(x, v)
        except RuntimeError:  # a compiler that cannot do it says so
            return
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lost", ["running_mean", "running_var"])
def test_half_of_the_statistics(lost):
    model = small().eval()
    setattr(blocks_of(model)[1].bn3, lost, None)
    for m in (model, plain_twin(model)):
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"{lost} (must|to) be defined"):
            m(pixels(size=32, dtype=torch.float32))


def test_statistics_made_in_inference_mode(engine):
    with torch.inference_mode():
        model = small().double().train()
        plain, x = plain_twin(model), pixels(size=32)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-12)
        for buffer, expected in zip(model.buffers(), plain.buffers()):
            torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-12)


def test_a_default_device_does_not_unfuse(monkeypatch):
    model = small().eval()
    calls = []
    monkeypatch.setattr("timm_eca.fused.blocks.fused_forward", lambda *args: calls.append(1) or args[2])
    with torch.no_grad(), torch.device("cpu"):
        blocks_of(model)[0](torch.randn(2, 8, 9, 9))
    assert calls == [1]


@pytest.mark.skipif(not native.loaded(), reason="no compiled passes")
@LAYOUTS
def test_sums_of_large_maps(layout):
    """A blank channel: its terms are small beside what a long row adds up to."""
    z = torch.full((1, 2, 1024, 1024), 0.1).to(memory_format=layout)
    weights = TailWeights(None, torch.sigmoid, None, None, None, None, None, 1e-5)
    _, _, moments = native.forward(z, None, weights, False, False)
    torch.testing.assert_close(moments.mean, torch.full((2,), 0.1), rtol=1e-5, atol=0)

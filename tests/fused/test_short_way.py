"""The short way to a tail by the compiled passes, and tensors that change between calls."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fused_models import MODELS, assert_same, blocks_of, check_step, create, pixels, plain_twin, small, step
from timm_eca.fused import forward, native

needs_library = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")


class Doubled(nn.Parameter):
    """A weight that batch norm sees twice as large as its elements are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.batch_norm:
                kwargs = {**kwargs, "weight": 2 * kwargs["weight"]}
            return func(*args, **(kwargs or {}))


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, not side by side."""
    return torch.stack([t, torch.full_like(t, 9)], 1)[:, 0]


def set_weight(block, weight):
    block.bn3.weight = weight


CHANGES = {
    "other values": lambda block: block.bn3.weight.data.mul_(3),
    "other weight": lambda block: set_weight(block, nn.Parameter(3 * block.bn3.weight.detach())),
    "other memory": lambda block: setattr(block.bn3.weight, "data", 3 * block.bn3.weight.data),
    "not side by side": lambda block: setattr(block.bn3.weight, "data", spread(block.bn3.weight.data)),
    "no weight": lambda block: set_weight(block, None),
    "no bias": lambda block: setattr(block.bn3, "bias", None),
    "class of its own": lambda block: set_weight(block, Doubled(block.bn3.weight.detach())),
    "other statistics": lambda block: setattr(block.bn3, "running_mean", block.bn3.running_mean + 1),
    "epsilon": lambda block: setattr(block.bn3, "eps", 0.5),
    "other kernel": lambda block: setattr(block.se.conv, "weight", nn.Parameter(torch.ones(1, 1, 3).double())),
}


@pytest.fixture
def short_ways(monkeypatch):
    """The tails that went the short way."""
    made = []

    def watched(*args):
        out = compiled_norm(*args)
        is_tail = args[1] is not None
        made.extend([1] if is_tail and out is not None else [])
        return out

    compiled_norm = forward.compiled_norm
    monkeypatch.setattr(forward, "compiled_norm", watched)
    return made


def infer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def check_inference(model: nn.Module, x: torch.Tensor, tolerance: float = 1e-12) -> None:
    expected = infer(plain_twin(model), x)
    assert (infer(model, x) - expected).abs().max() <= tolerance * expected.abs().max()


class TestShortWay:
    @needs_library
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
    @pytest.mark.parametrize("name", MODELS)
    def test_taken_without_a_downsample(self, short_ways, name, trained, layout):
        model = create(name, **MODELS[name]).double().train(trained).to(memory_format=layout)
        for block in blocks_of(model):
            block.drop_path = nn.Identity()
        tails = sum(getattr(block, "downsample", None) is None for block in blocks_of(model))
        x = pixels(2, 96).contiguous(memory_format=layout)
        check_step(model, x) if trained else check_inference(model, x)
        assert len(short_ways) == tails

    @needs_library
    def test_given_means(self, short_ways, monkeypatch):
        monkeypatch.setattr("timm_eca.fused.pooled._LARGE", 0)
        check_inference(small(channels=(16, 16, 32, 64)).double().eval(), pixels(2, 128))
        assert short_ways

    @needs_library
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
    def test_shortcut_laid_out_otherwise(self, short_ways, trained):
        block = small().double().train(trained).to(memory_format=torch.channels_last).layer2[1]
        plain = plain_twin(block)
        x = torch.randn(2, 48, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for given in (x, x.mT.contiguous().mT, x.contiguous(memory_format=torch.channels_last)):
            with torch.set_grad_enabled(trained):
                torch.testing.assert_close(block(given), plain(given), rtol=1e-12, atol=1e-12)
        assert len(short_ways) == 3

    @needs_library
    def test_half_precision(self, short_ways):
        model = small().eval().bfloat16()
        check_inference(model, pixels(dtype=torch.bfloat16), tolerance=0.05)
        assert len(short_ways) == sum(block.downsample is None for block in blocks_of(model))

    @needs_library
    def test_autocast(self, short_ways):
        model = small().eval()
        for half in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                check_inference(model, pixels(dtype=torch.float32), tolerance=0.05 if half else 1e-5)
        assert len(short_ways) == 2 * sum(block.downsample is None for block in blocks_of(model))

    def test_not_with_a_drop_path_at_work(self, short_ways):
        model = create("mobilenetv2_050", **MODELS["mobilenetv2_050"]).double().eval()
        plain = plain_twin(model)
        adding = [block for block in blocks_of(model) if block.has_skip]
        for block in (*adding, *(m for m in plain.modules() if getattr(m, "has_skip", False))):
            block.drop_path.train()
        found = []
        for net in (model, plain):
            torch.manual_seed(0)
            found.append(infer(net, pixels()))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        assert len(short_ways) == (len(blocks_of(model)) - len(adding)) * native.loaded()

    def test_not_on_other_devices(self, short_ways):
        model = small().eval()
        model.layer2[1].bn3.to("meta")
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            infer(model, pixels(dtype=torch.float32))


class TestChanged:
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_between_calls(self, change, trained):
        model = small().double().train(trained)
        for _ in range(2):
            step(model, pixels()) if trained else infer(model, pixels())
        CHANGES[change](model.layer2[1])
        for _ in range(2):
            check_step(model) if trained else check_inference(model, pixels())

    def test_class_of_its_own_is_plain(self, fused_calls):
        model = small().double().eval()
        block = model.layer2[1]
        set_weight(block, Doubled(block.bn3.weight.detach()))
        infer(model, pixels())
        assert len(fused_calls) == len(blocks_of(model)) - 1

    def test_type(self):
        model = small().eval()
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12), (torch.float32, 1e-4)):
            for _ in range(2):
                check_inference(model.to(dtype), pixels(dtype=dtype), tolerance)

    def test_layout(self):
        model = small().double()
        for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
            for _ in range(2):
                check_step(model, pixels().contiguous(memory_format=layout))

    def test_training_and_evaluation_in_turn(self):
        model = small(drop_path_rate=0.3).double()
        for _ in range(3):
            check_step(model.train())
            check_inference(model.eval(), pixels())
            check_step(model)

    def test_one_value_for_a_channel(self):
        model = small(layers=(1, 1, 1, 2)).double().eval()
        for _ in range(2):
            check_inference(model, pixels(1, 32))
        model.layer4[1].bn3.train()
        for net in (model, plain_twin(model)):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                infer(net, pixels(1, 32))

    def test_statistics_no_longer_tracked(self):
        model = small().double().train()
        twin = copy.deepcopy(model)
        for net in (model, twin):
            step(net, pixels())
            for block in blocks_of(net):
                block.bn3.track_running_stats = False
        assert_same(step(model, pixels()), step(plain_twin(twin), pixels()))


class Labelled(torch.Tensor):
    """A tensor of a class of its own."""


@needs_library
@pytest.mark.parametrize("relu", [True, False])
def test_gradient_of_a_class_of_its_own(relu):
    name = "resnet18" if relu else "mobilenetv2_050"
    block = blocks_of(create(name, **MODELS[name]).double().eval())[-1 if relu else 1]
    found = []
    for net in (block, plain_twin(block)):
        x = torch.randn(2, net.conv1.in_channels if relu else net.conv_pw.in_channels, 6, 6, dtype=torch.float64)
        x = x.copy_(torch.linspace(-1, 1, x.numel()).view_as(x)).requires_grad_()
        out = net(x)
        out.backward(torch.linspace(-2, 1, out.numel()).view_as(out).double().as_subclass(Labelled))
        found.append(x.grad.as_subclass(torch.Tensor))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

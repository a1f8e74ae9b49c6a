"""Norms before a block's last convolution, computed at once with their activations, against the modules themselves."""

import copy
from types import MethodType

import pytest
import torch
from timm.layers import FrozenBatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops.misc import FrozenBatchNorm2d

from fused_models import ECA, MODELS, SMALL, blocks_of, check_step, create, pixels, plain_twin, small, step
from timm_eca.fused import blocks, native, norms
from timm_eca.fused.eligible import find_parts

needs_library = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")
NHWC, NCHW = torch.channels_last, torch.contiguous_format
LAYOUTS = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


@pytest.fixture
def at_once(monkeypatch):
    """The inner norms that were computed with their activations."""
    made = []

    def watched(norm, kernel, *args):
        out = compiled_norm(norm, kernel, *args)
        made.extend([norm.module] if out is not None else [])
        return out

    def watched_pool(norm, conv, z):
        pooled = compiled_pool(norm, conv, z)
        made.extend([norm.norm.module] if pooled is not None else [])
        return pooled

    compiled_norm, compiled_pool = norms.compiled_norm, blocks.compiled_pool
    monkeypatch.setattr(norms, "compiled_norm", watched)
    monkeypatch.setattr(blocks, "compiled_pool", watched_pool)
    return made


def norm_of(channels: int, act: str = "relu", dtype: torch.dtype = torch.float64) -> norms.InnerNorm:
    """One that lets through some of what it gets, from below and from above."""
    generator = torch.Generator().manual_seed(channels)
    module = nn.BatchNorm2d(channels).to(dtype)
    for tensor in (module.weight, module.bias, module.running_mean):
        nn.init.normal_(tensor, std=4, generator=generator)
    nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
    part = norms.NormPart(module, False, module._parameters, module._buffers)
    return norms.InnerNorm(part, norms.Act[act.upper()], (module, ACTS[act]()))


def plain(norm: norms.InnerNorm) -> nn.Sequential:
    return nn.Sequential(*norm.modules).double()


def map_of(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return made.to(dtype).contiguous(memory_format=layout)


def all_of(function, parameters, x: torch.Tensor) -> list[torch.Tensor]:
    """A result and its gradients."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x)
    grads = torch.autograd.grad(out, (x, *parameters), torch.linspace(-2, 1, out.numel()).view_as(out).to(out))
    return [out.detach(), *grads]


def check(norm: norms.InnerNorm, x: torch.Tensor, tolerance: float) -> None:
    """Compare with the modules in double precision: results, gradients, running statistics."""
    module = norm.norm.module
    exact = copy.deepcopy(plain(copy.deepcopy(norm)))
    found = [*all_of(norm, (module.weight, module.bias), x), *module.buffers()]
    expected = [*all_of(exact, (exact[0].weight, exact[0].bias), x.double()), *exact[0].buffers()]
    for actual, given in zip(found, expected, strict=True):
        assert actual.shape == given.shape
        assert (actual.double() - given).abs().max() <= tolerance * given.abs().max().clamp(min=1e-2)


@needs_library
class TestIsItsModules:
    @LAYOUTS
    @pytest.mark.parametrize("act", ACTS)
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("shape", [(2, 1, 5, 3), (1, 7, 31, 29), (3, 33, 8, 8), (2, 64, 16, 16), (2, 130, 7, 7)])
    def test_shapes(self, threads, shape, trained, act, layout):
        norm = norm_of(shape[1], act)
        norm.norm.module.train(trained)
        check(norm, map_of(shape, layout), 1e-12)
        x = map_of(shape, layout)
        with torch.no_grad():
            torch.testing.assert_close(norm(x.clone()), plain(copy.deepcopy(norm))(x), rtol=1e-12, atol=1e-12)

    @LAYOUTS
    @pytest.mark.parametrize("act", ACTS)
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.02)], ids=str)
    def test_less_precise(self, dtype, tolerance, trained, act, layout):
        norm = norm_of(48, act, torch.float32)
        norm.norm.module.train(trained)
        shape = (2, 48, 12, 12)
        x = map_of(shape, layout).bfloat16().to(dtype)
        with torch.no_grad():
            ahead = plain(copy.deepcopy(norm))[0](x.double())
        off = torch.minimum(ahead.abs(), (ahead - 6).abs()) < 0.1  # where rounding decides what is let through
        given = (norm, dtype), (plain(copy.deepcopy(norm)), torch.float64)
        found, expected = (all_of(function, (), x.to(kind)) for function, kind in given)
        assert found[0].dtype == dtype
        for actual, exact in zip(found, expected):
            assert (actual.double() - exact)[~off].abs().max() <= tolerance * exact.abs().max()

    @pytest.mark.parametrize("act", ACTS)
    def test_not_a_number(self, act):
        norm = norm_of(3, act)
        norm.norm.module.eval()
        x = map_of((1, 3, 4, 4), NCHW)
        x[0, 1, 2, 2], x[0, 2, 0, 0], x[0, 0, 0, 0] = float("nan"), float("inf"), -float("inf")
        with torch.no_grad():
            torch.testing.assert_close(norm(x.clone()), plain(norm)(x), equal_nan=True)

    def test_keeps_nothing_besides(self):
        norm = norm_of(16)
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            x = map_of((2, 16, 8, 8), NCHW).requires_grad_()
            out = norm(x)
        weights = {t.data_ptr() for t in norm.norm.module.parameters()}
        vectors = [t for at, t in kept.items() if at not in weights | {x.data_ptr(), out.data_ptr()}]
        assert sorted(t.shape for t in vectors) == [(16,), (16,)]


@needs_library
class TestDerivatives:
    @pytest.fixture(params=ACTS)
    def norm(self, request):
        return norm_of(4, request.param)

    @pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
    def test_first_and_second(self, norm, trained):
        module = norm.norm.module.train(trained)
        x = map_of((2, 4, 3, 3), NCHW).requires_grad_()

        def function(x, weight, bias):
            module._parameters.update(weight=weight, bias=bias)
            return norm(x)

        inputs = (x, *(p.detach().requires_grad_() for p in module.parameters()))
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_batch_of_cotangents(self, norm):
        found = []
        for function in (norm, plain(copy.deepcopy(norm))):
            x = map_of((2, 4, 3, 3), NCHW).requires_grad_()
            out = function(x)
            cotangents = torch.eye(out.numel(), dtype=out.dtype)[:5].view(5, *out.shape)
            found.append(torch.autograd.grad(out, x, cotangents, is_grads_batched=True)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

    def test_of_weights_alone(self, norm):
        exact, x = plain(copy.deepcopy(norm)), map_of((2, 4, 5, 5), NHWC)
        found = []
        for function, module in ((norm, norm.norm.module), (exact, exact[0])):
            function(x.clone()).square().sum().backward()
            found.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

    def test_frozen_weights(self, norm):
        for p in norm.norm.module.parameters():
            p.requires_grad_(False)
        exact = plain(copy.deepcopy(norm))
        found = [all_of(f, (), map_of((2, 4, 5, 5), NHWC)) for f in (norm, exact)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def inner_modules(model: nn.Module) -> list[nn.Module]:
    return [part.norm.module for block in blocks_of(model) for part in find_parts(block, block._rule).inner]


CHANGES = {
    "momentum": lambda norm: setattr(norm, "momentum", None),
    "no weights": lambda norm: norm._parameters.update(weight=None, bias=None),
    "statistics of the batch": lambda norm: setattr(norm, "track_running_stats", False),
    "no statistics": lambda norm: norm._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None),
    "evaluation": lambda norm: norm.eval(),
    "a frozen weight": lambda norm: norm.weight.requires_grad_(False),
}


class TestBlocks:
    @needs_library
    @LAYOUTS
    @pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
    @pytest.mark.parametrize("name", MODELS)
    def test_all_are_computed_at_once(self, at_once, name, trained, layout):
        model = create(name, **MODELS[name]).double().train(trained).to(memory_format=layout)
        expected = inner_modules(model)
        assert bool(expected) == (bool(blocks_of(model)) and name != "efficientnet_b0")  # whose activation is SiLU
        x = pixels(2).contiguous(memory_format=layout)
        with torch.set_grad_enabled(trained):
            model(x)
        assert [module for module in at_once if module in expected] == expected

    @pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU])
    def test_activations(self, act):
        for trained in (True, False):
            check_step(create("resnet26", act_layer=act, **SMALL).double().train(trained))

    @pytest.mark.parametrize("change", CHANGES)
    def test_norms(self, change):
        model = small().double().train()
        step(model, pixels())
        for module in inner_modules(model):
            CHANGES[change](module)
        for _ in range(2):
            check_step(model)

    @pytest.mark.parametrize("frozen", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
    def test_frozen(self, at_once, frozen):
        name = "resnet26" if frozen is FrozenBatchNorm2d else "mobilenetv2_050"
        model = create(name, **(SMALL if name == "resnet26" else ECA)).double().train()
        model = freeze_batch_norm_2d(model)
        assert {type(module) for module in inner_modules(model)} == {frozen}
        check_step(model)
        assert len(at_once) == len(inner_modules(model)) * native.loaded()

    def test_synchronised_only_in_evaluation(self, at_once):
        model = convert_sync_batchnorm(small()).double().eval()
        check_step(model)
        count = len(inner_modules(model)) * native.loaded()
        assert len(at_once) == count
        blocks_of(model)[0].bn1.train()
        check_step(model)
        assert len(at_once) == 2 * count - 2 * native.loaded()

    def test_one_value_for_a_channel(self):
        model = small().double().train()
        for net in (model, plain_twin(model)):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                net(pixels(1, 32))


INSIDE = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2")


class TestPlain:
    """What somebody listens to, or has changed, is computed as it is."""

    @pytest.fixture
    def model(self):
        return small().double().eval()

    @pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
    @pytest.mark.parametrize("place", INSIDE)
    def test_hooks(self, model, at_once, fused_calls, place, kind):
        if kind == "full_backward_hook":
            for block in (m for m in model.modules() if hasattr(m, "inplace")):
                block.inplace = False
        check_step(model)
        norms_each, tails_each, heard = len(at_once), len(fused_calls), []
        assert norms_each == len(inner_modules(model)) * native.loaded()
        module = model.layer2[1].get_submodule(place)
        handle = getattr(module, f"register_{kind}")(lambda *args: heard.append(args[0]))
        check_step(model)
        assert heard[0] is module
        assert len(fused_calls) == 2 * tails_each  # the tail is as it was
        assert len(at_once) == 2 * norms_each - 2 * native.loaded()
        handle.remove()
        check_step(model)
        assert len(at_once) == 3 * norms_each - 2 * native.loaded()

    def test_what_a_hook_kept_is_not_overwritten(self, model):
        kept = []

        def keep(module, args, out):
            kept.append((out, out.clone()))

        for name in ("conv1", "conv2"):
            model.layer2[1].get_submodule(name).register_forward_hook(keep)
        with torch.no_grad():
            model(pixels())
        assert len(kept) == 2
        for out, as_it_was in kept:
            assert torch.equal(out, as_it_was)

    @pytest.mark.parametrize("place", INSIDE)
    def test_patched_forward(self, model, place):
        module = model.layer2[1].get_submodule(place)
        module.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), module)
        check_step(model)

    @pytest.mark.parametrize(
        ("place", "other"),
        [("act1", nn.SiLU()), ("bn1", nn.Identity()), ("drop_block", nn.Dropout(1.0)), ("act2", nn.Identity())],
    )
    def test_replaced(self, model, place, other):
        check_step(model)
        setattr(model.layer2[1], place, other)
        check_step(model.train())

    @pytest.mark.parametrize("place", ["act", "drop"])
    def test_replaced_in_a_norm(self, place):
        model = create("mobilenetv2_050", **ECA).double().eval()
        check_step(model)
        setattr(blocks_of(model)[3].bn1, place, nn.LeakyReLU())
        check_step(model)

    def test_parametrized(self, model):
        class Twice(nn.Module):
            def forward(self, weight):
                return 2 * weight

        check_step(model)
        parametrize.register_parametrization(model.layer2[1].bn1, "weight", Twice())
        check_step(model)

    def test_without_the_library(self, model, monkeypatch):
        monkeypatch.setattr(native, "_loaded", False)
        check_step(model)
        check_step(model.train())

    def test_kernel_of_zero(self, model, at_once):
        for block in blocks_of(model):
            nn.init.zeros_(block.se.conv.weight)
        found, expected = (step(net, pixels())["outputs"][""] for net in (model, plain_twin(model)))
        assert torch.equal(found, expected)
        assert not at_once


@needs_library
class TestShortcuts:
    def test_their_norm_in_training(self, monkeypatch):
        from timm_eca.fused import forward

        made = []

        def watched(norm, kernel, *args):
            made.extend([norm.module] if kernel is None else [])
            return compiled_norm(norm, kernel, *args)

        compiled_norm = forward.compiled_norm
        monkeypatch.setattr(forward, "compiled_norm", watched)
        model = small().double().train()
        check_step(model)
        assert made == [block.downsample[-1] for block in blocks_of(model) if block.downsample is not None]

import pytest
import timm
import torch
from timm.layers import SEModule
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import timm_eca
from fused_models import ECA, assert_same, blocks_of, check_step, create, pixels, plain_twin, small, step


class TestTransforms:
    """Transforms of single operations see the plain ones."""

    @pytest.fixture
    def net(self):
        model = small().double().eval()
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(net, parameters, x):
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

        return model, plain_twin(model), parameters, loss

    def test_functional_call(self, fused_calls, net):
        model, plain, parameters, loss = net
        parameters = {name: 1.5 * p for name, p in parameters.items()}
        x = pixels(2, 32)
        torch.testing.assert_close(loss(model, parameters, x), loss(plain, parameters, x), rtol=1e-12, atol=0)

    def test_grad(self, fused_calls, net):
        model, plain, parameters, loss = net
        actual, expected = (torch.func.grad(loss, 1)(m, parameters, pixels(2, 32)) for m in (model, plain))
        assert_same({"grads": actual}, {"grads": expected})
        assert not fused_calls

    def test_gradients_of_samples(self, fused_calls, net):
        model, plain, parameters, loss = net
        found = []
        for m in (model, plain):
            grad = torch.func.grad(lambda p, x, m=m: loss(m, p, x[None]))
            found.append({"grads": torch.func.vmap(grad, (None, 0))(parameters, pixels(2, 32))})
        assert_same(*found)
        assert not fused_calls

    def test_forward_mode(self, fused_calls, net):
        model, plain, *_ = net
        x, tangent = pixels(1, 32), pixels(1, 32).flip(3)
        actual, expected = (torch.func.jvp(m, (x,), (tangent,))[1] for m in (model, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(dual, expected, rtol=1e-12, atol=1e-12)
        assert not fused_calls

    @pytest.mark.parametrize("compiled_passes", [True, False])
    def test_batch_of_cotangents(self, monkeypatch, net, compiled_passes):
        if not compiled_passes:
            monkeypatch.setattr("timm_eca.fused.native._loaded", False)
        found = []
        for m in net[:2]:
            x = pixels(2, 32).requires_grad_()
            out = m(x)
            cotangents = torch.eye(out.numel(), dtype=out.dtype)[:3].view(3, *out.shape)
            found.append(torch.autograd.grad(out, x, cotangents, is_grads_batched=True)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class TestHooks:
    @pytest.fixture
    def model(self):
        return small().double().eval()

    # A backward hook where something is written to in place afterwards is PyTorch's error on the plain path too.
    @pytest.mark.parametrize(
        ("kind", "place"),
        [
            (kind, place)
            for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
            for place in ("conv3", "bn3", "se", "se.conv", "se.gate", "act3", "")
            if not ("backward" in kind and place in ("se", "act3"))
        ],
    )
    def test_called(self, fused_calls, model, kind, place):
        expected = step(plain_twin(model), pixels(1))
        step(model, pixels(1))
        count, heard = len(fused_calls), []
        assert count == len(blocks_of(model))
        module = model.layer2[1].get_submodule(place)
        handle = getattr(module, f"register_{kind}")(lambda *args: heard.append(args[0]))
        assert_same(step(model, pixels(1)), expected)
        assert heard == [module]
        assert len(fused_calls) == 2 * count - 1
        handle.remove()
        assert_same(step(model, pixels(1)), expected)
        assert heard == [module]
        assert len(fused_calls) == 3 * count - 1

    def test_changes_what_comes_next(self, fused_calls, model):
        model(pixels(1))
        before = len(fused_calls)
        model.layer2[1].bn3.register_forward_hook(lambda module, args, out: 2 * out)
        check_step(model)
        assert len(fused_calls) == 2 * before - 1

    @pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
    def test_on_all_modules(self, fused_calls, register):
        model = create("mobilenetv2_050", **ECA).double().eval()
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        heard = set()
        handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *_: heard.add(module))
        try:
            step(model, pixels(1))
        finally:
            handle.remove()
        norms = {module for name, module in model.named_modules() if name.endswith(("bn1", "bn2", "bn3"))}
        assert {*norms, *blocks_of(model), *timm_eca.attn_modules(model).values()} <= heard
        assert not fused_calls
        step(model, pixels(1))
        assert len(fused_calls) == len(blocks_of(model))

    def test_downsample(self, fused_calls, model):
        heard = []
        model.layer2[0].downsample.register_forward_hook(lambda *_: heard.append(1))
        check_step(model)
        assert heard
        assert fused_calls


CHANGES = {
    "act": lambda block: setattr(block, "act3", nn.GELU()),
    "no act": lambda block: setattr(block, "act3", nn.Identity()),
    "in place act": lambda block: setattr(block, "act3", nn.Hardtanh(0, 0.5, inplace=True)),
    "attn": lambda block: setattr(block, "se", SEModule(48, rd_channels=4).double()),
    "no attn": lambda block: setattr(block, "se", None),
    "gate": lambda block: setattr(block.se, "gate", nn.Tanh()),
    "kernel": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 9, padding=4, bias=False).double()),
    "dilated": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False).double()),
    "biased": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 3, padding=1).double()),
    "norm": lambda block: setattr(block, "bn3", nn.GroupNorm(4, 48).double()),
    "no norm": lambda block: setattr(block, "bn3", nn.Identity()),
    "conv": lambda block: setattr(block, "conv3", nn.Sequential(block.conv3, nn.Tanh())),
    "drop path": lambda block: setattr(block, "drop_path", nn.Dropout(0.5)),
    "downsample": lambda block: setattr(block, "downsample", nn.Conv2d(48, 48, 1).double()),
    "new kernel": lambda block: setattr(block.se.conv, "weight", nn.Parameter(torch.ones(1, 1, 3).double())),
    "new weight": lambda block: setattr(block.bn3, "weight", nn.Parameter(torch.full((48,), 3.0).double())),
    "pruned": lambda block: prune.l1_unstructured(block.bn3, "weight", 0.5),
    "parametrized norm": lambda block: parametrize.register_parametrization(block.bn3, "weight", nn.Softplus()),
    "parametrized kernel": lambda block: parametrize.register_parametrization(block.se.conv, "weight", nn.Tanh()),
    "forward of act": lambda block: setattr(block.act3, "forward", torch.tanh),
    "forward of norm": lambda block: setattr(block.bn3, "forward", torch.tanh),
    "forward of attn": lambda block: setattr(block.se, "forward", lambda x: 2 * x),
    "forward of block": lambda block: setattr(block, "forward", torch.tanh),
}


class TestReplaced:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_takes_effect(self, fused_calls, change, train):
        model = small().double().train(train)
        before = step(model, pixels())["outputs"][""]
        plain = plain_twin(model)
        for net in (model, plain):
            torch.manual_seed(5)
            CHANGES[change](net.layer2[1])
        actual = step(model, pixels())
        assert not torch.equal(actual["outputs"][""], before)
        assert_same(actual, step(plain, pixels()))
        assert len(fused_calls) >= 2 * len(blocks_of(model)) - 1

    def test_forward_of_a_class(self, fused_calls, monkeypatch):
        model = small().eval()
        monkeypatch.setattr(timm.models.resnet.Bottleneck, "forward", lambda block, x: 0 * x)
        assert not model.layer4(torch.randn(2, 64, 4, 4)).any()

import pytest
import torch

from tail_cases import LAYOUTS, LEAVES, ON_CPU, Case, leaves, make, plain_out, tail_of, weights_of
from timm_eca.fused.tail import fused_tail


def with_graph(case: Case) -> tuple[dict, dict, torch.Tensor]:
    """A case's tensors, the leaves made of them, and the fused tail of those."""
    made = make(case, torch.float64)
    inputs = leaves(made)
    weights, _ = weights_of(case, inputs, made)
    return made, inputs, fused_tail(inputs["z"], inputs["shortcut"], weights, case.relu)


class TestAutograd:
    @ON_CPU
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("changed", [{}, {"drop": True}, {"relu": False, "add": False}], ids=str)
    @pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
    def test_gradcheck(self, engine, check, changed, train):
        case = Case((2, 3, 2, 2), train=train, tracked=False, eps=0.1, **changed)
        made = make(case, torch.float64)
        names = [name for name in LEAVES if made[name] is not None]

        def function(*tensors: torch.Tensor) -> torch.Tensor:
            inputs = dict(zip(names, tensors))
            weights, _ = weights_of(case, inputs, made)
            return fused_tail(inputs["z"], inputs.get("shortcut"), weights, case.relu)

        with torch.no_grad():
            ahead, _ = plain_out(case, made, made, relu=False)
        assert not case.relu or ahead.abs().min() > 1e-3
        assert check(function, tuple(leaves(made).values()))

    @ON_CPU
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(
        "loss",
        [
            lambda out: out.mean(),
            lambda out: out.mean((2, 3)).square().sum(),
            lambda out: (out.transpose(2, 3).contiguous() * torch.arange(out[0, 0].numel()).view(7, 5)).sum(),
            lambda out: out[:, ::2, 1:, ::3].square().sum(),
            lambda out: out.square().contiguous(memory_format=torch.channels_last).sum(),
            lambda out: out.permute(1, 0, 3, 2).reshape(9, -1).cumsum(1).square().sum(),
        ],
        ids=["expanded", "pooled", "transposed", "sliced", "channels_last", "permuted"],
    )
    @pytest.mark.parametrize("relu", [True, False])
    def test_layout_of_gradient(self, engine, loss, layout, relu):
        case = Case(layout=layout, relu=relu)
        made = make(case, torch.float64)
        inputs, ours = leaves(made), leaves(made)
        loss(plain_out(case, inputs, made, relu)[0]).backward()
        weights, _ = weights_of(case, ours, made)
        loss(fused_tail(ours["z"], ours["shortcut"], weights, relu)).backward()
        largest = max(t.grad.abs().max() for t in inputs.values())
        for name in LEAVES:
            scale = max(inputs[name].grad.abs().max(), 1e-2 * largest)
            torch.testing.assert_close(ours[name].grad, inputs[name].grad, rtol=0, atol=1e-12 * scale)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("other", ["other", "sliced", "expanded"])
    def test_layout_of_shortcut(self, engine, layout, other):
        case = Case(layout=layout)
        made = make(case, torch.float64)
        wide = torch.randn(3, 9, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        made["shortcut"] = {
            "other": made["shortcut"].contiguous(memory_format=LAYOUTS[layout is LAYOUTS[0]]),
            "sliced": wide[:, :, ::2],
            "expanded": made["shortcut"][:, :1, :1].expand(case.shape),
        }[other]
        expected, _ = plain_out(case, made, made, relu=True)
        weights, _ = weights_of(case, made, made)
        torch.testing.assert_close(
            fused_tail(made["z"], made["shortcut"], weights, True), expected, rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("changed", [{}, {"relu": False}, {"relu": False, "add": False}], ids=str)
    def test_in_place_without_gradient(self, engine, changed, train, context):
        case = Case(train=train, **changed)
        made = make(case, torch.float64)
        expected, _ = plain_out(case, made, made, case.relu)
        shortcut = None if made["shortcut"] is None else made["shortcut"].clone()
        weights, _ = weights_of(case, made, made)
        with context() if context else torch.enable_grad():
            out = fused_tail(made["z"], made["shortcut"], weights, case.relu)
        assert out.data_ptr() == made["z"].data_ptr()
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        assert shortcut is None or torch.equal(shortcut, made["shortcut"])

    def test_input_kept_with_gradient(self, engine):
        made, inputs, _ = with_graph(Case())
        assert torch.equal(inputs["z"], made["z"])
        assert torch.equal(inputs["shortcut"], made["shortcut"])

    @pytest.mark.parametrize("relu", [True, False])
    def test_keeps_no_more_than_its_maps(self, engine, relu):
        case = Case((2, 16, 24, 24), relu=relu)
        made = make(case, torch.float32)
        inputs = leaves(made)
        weights, _ = weights_of(case, inputs, made)
        kept = {}

        def keep(t):
            kept[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = fused_tail(inputs["z"], inputs["shortcut"], weights, relu)
        large = {address for address, count in kept.items() if count >= out.numel()}
        assert large == ({inputs["z"].data_ptr(), out.data_ptr()} if relu else {inputs["z"].data_ptr()})
        assert sum(kept.values()) - len(large) * out.numel() <= 8 * 2 * 16

    def test_backward_twice_needs_the_graph(self, engine):
        made, inputs, out = with_graph(Case())
        first = torch.autograd.grad(out, inputs["z"], made["cotangent"], retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out, inputs["z"], made["cotangent"])[0])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, inputs["z"], made["cotangent"])

    def test_changed_input_is_noticed(self, engine):
        made, _, out = with_graph(Case())
        out.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(made["cotangent"])

    def test_autocast_leaves_the_types(self, engine):
        case = Case()
        made = make(case, torch.float32)
        expected = tail_of(case, made)
        with torch.autocast("cpu", torch.bfloat16):
            actual = tail_of(case, made)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

from math import exp

import pytest
import torch
from torch import nn

from tail_cases import (
    LAYOUTS,
    LEAVES,
    ON_CPU,
    TOLERANCES,
    Case,
    check,
    leaves,
    make,
    plain,
    plain_out,
    tail_of,
    weights_of,
)
from timm_eca import EcaLayer
from timm_eca.fused.formula import Moments, Running, TailWeights, tail_formula
from timm_eca.fused.tail import fused_tail


class TestHandComputed:
    """One channel and a kernel of one weight a: w = sigmoid(a * q)."""

    @staticmethod
    def tail(engine, z, **kwargs):
        weights = {name: torch.tensor([value], dtype=torch.float64) for name, value in kwargs.pop("norm").items()}
        leaf = [t.requires_grad_() for t in (z, weights["weight"], weights["bias"])]
        kernel = torch.tensor([[[0.5]]], dtype=torch.float64, requires_grad=True)
        fields = {"drop": None, "running": None, "moments": None, **kwargs}
        shortcut = fields.pop("shortcut")
        relu = fields.pop("relu")
        return fused_tail(z, shortcut, TailWeights(kernel, torch.sigmoid, *leaf[1:], **fields), relu), [*leaf, kernel]

    def test_given_moments(self, engine):
        z = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
        shortcut = torch.tensor([-9.0, 0.25], dtype=torch.float64).view(1, 1, 1, 2)
        moments = Moments(torch.tensor([1.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64))
        out, inputs = self.tail(
            engine, z, norm={"weight": 2.0, "bias": 0.5}, moments=moments, eps=1.0, shortcut=shortcut, relu=True
        )
        # The norm is (z - 1) * 2 / sqrt(3 + 1) + 0.5, so 0.5 and 2.5; their mean q is 1.5.
        w = 1 / (1 + exp(-0.5 * 1.5))
        torch.testing.assert_close(
            out.flatten(), torch.tensor([0.0, w * 2.5 + 0.25], dtype=torch.float64), rtol=1e-14, atol=0
        )
        # The first is cut off by the ReLU, so of d(out) only the second is left: by itself and by the mean in w.
        slope = 2.5 * w * (1 - w)
        dz, dgamma, dbeta, dkernel = torch.autograd.grad(out.sum(), inputs)
        torch.testing.assert_close(dz.flatten(), torch.tensor([slope * 0.25, w + slope * 0.25], dtype=torch.float64))
        torch.testing.assert_close(dgamma.item(), w * 1.0 + slope * 0.5 * 0.5, rtol=1e-14, atol=0)
        torch.testing.assert_close(dbeta.item(), w + slope * 0.5, rtol=1e-14, atol=0)
        torch.testing.assert_close(dkernel.item(), slope * 1.5, rtol=1e-14, atol=0)

    def test_moments_of_the_batch(self, engine):
        z = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64).view(2, 1, 1, 2)
        running = Running(torch.zeros(1).double(), torch.ones(1).double(), 0.1)
        drop = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
        out, _ = self.tail(
            engine,
            z,
            norm={"weight": 3.0, "bias": 1.0},
            running=running,
            drop=drop,
            eps=4.0,
            shortcut=torch.full_like(z, 10),
            relu=False,
        )
        # Mean 4 and variance 5: the norm is (z - 4) * 3 / sqrt(5 + 4) + 1; the second sample is dropped.
        w = 2 / (1 + exp(0.5 * 1.0))
        torch.testing.assert_close(
            out.flatten(), torch.tensor([10 - 2 * w, 10.0, 10.0, 10.0], dtype=torch.float64), rtol=1e-14, atol=0
        )
        torch.testing.assert_close(running.mean.item(), 0.4, rtol=1e-14, atol=0)
        torch.testing.assert_close(running.var.item(), 0.9 + 0.1 * 20 / 3, rtol=1e-14, atol=0)

    def test_neighbours(self, engine):
        z = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
        moments = Moments(torch.zeros(3).double(), torch.ones(3).double())
        kernel = torch.tensor([[[1.0, 2.0, -1.0]]], dtype=torch.float64)
        out = fused_tail(z, None, TailWeights(kernel, torch.sigmoid, None, None, moments, None, None, 0.0), False)
        # Rows of the band matrix: (2, -1, 0), (1, 2, -1), (0, 1, 2), so the convolved vector is 2, -1, 4.
        expected = torch.tensor([1 / (1 + exp(-2)), 0.0, 2 / (1 + exp(-4))]).double()
        torch.testing.assert_close(out.flatten(), expected)


SHAPES = [
    (2, 1, 1, 1),
    (2, 6, 1, 1),
    (1, 5, 3, 1),
    (1, 3, 2, 2),
    (2, 64, 3, 3),
    (3, 65, 5, 3),
    (2, 129, 7, 9),
    (4, 200, 2, 1),
]


class TestOracle:
    @ON_CPU
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, engine, shape, train, layout, dtype):
        # Batch norm divides by the deviation: that of two values alone may be nearly none, so eps is no smaller.
        check(Case(shape, 5, train=train, layout=layout, eps=1e-2), dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "changed",
        [
            {"relu": False},
            {"relu": False, "add": False},
            {"affine": False},
            {"drop": True},
            {"drop": True, "relu": False},
            {"drop": True, "affine": False, "add": False, "relu": False},
            {"tracked": False},
            {"momentum": 1.0},
            {"kernel_size": 1},
            {"kernel_size": 9},
            {"kernel_size": 23},
            {"eps": 1e-3},
        ],
        ids=str,
    )
    def test_variants(self, engine, changed, train, layout):
        check(Case(train=train, layout=layout, **changed), torch.float64)

    @ON_CPU
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("shape", [(1, 130, 17, 16), (5, 70, 11, 10), (5, 130, 9, 8)])
    def test_threads(self, engine, threads, shape, train, layout):
        check(Case(shape, train=train, layout=layout, drop=True), torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("seed", range(12))
    def test_random(self, engine, seed, dtype):
        generator = torch.Generator().manual_seed(100 + seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        add = draw(0, 4) > 0
        case = Case(
            (draw(2, 6), draw(1, 150), draw(1, 12), draw(1, 12)),
            kernel_size=2 * draw(0, 5) + 1,
            train=bool(draw(0, 2)),
            affine=draw(0, 4) > 0,
            add=add,
            relu=add and draw(0, 2) == 0,
            drop=bool(draw(0, 2)),
            layout=LAYOUTS[draw(0, 2)],
            eps=1e-3,
            seed=seed,
        )
        check(case, dtype)

    @pytest.mark.parametrize("vectors", [None, torch.float32], ids=["all half", "float32 weights"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_half_precision(self, engine, train, layout, dtype, vectors):
        check(Case((4, 20, 6, 5), train=train, layout=layout, drop=True), dtype, vectors)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("changed", [{}, {"drop": True, "relu": False}, {"affine": False, "add": False}], ids=str)
    def test_formula(self, changed, train, dtype):
        check(Case(train=train, **changed), dtype, function=tail_formula)

    @pytest.mark.parametrize("wanted", LEAVES)
    def test_one_gradient(self, engine, wanted):
        case = Case()
        made = make(case, torch.float64)
        expected = plain(case, made)
        inputs = {name: t.requires_grad_(name == wanted) for name, t in leaves(made).items()}
        weights, _ = weights_of(case, inputs, made)
        fused_tail(inputs["z"], inputs["shortcut"], weights, True).backward(made["cotangent"])
        assert {name for name, t in inputs.items() if t.grad is not None} == {wanted}
        scale = expected[wanted].abs().max()
        torch.testing.assert_close(inputs[wanted].grad, expected[wanted], rtol=0, atol=1e-12 * scale)

    @pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid", "tanh"])
    def test_gates(self, gate):
        case = Case()
        made, layer = make(case, torch.float64), EcaLayer(kernel_size=3, gate_layer=gate).double()
        layer.conv.weight.data = made["kernel"]
        weights, _ = weights_of(case, made, made, layer.gate)
        normed = nn.functional.batch_norm(made["z"], None, None, made["weight"], made["bias"], True, eps=case.eps)
        expected = torch.relu(layer(normed) + made["shortcut"])
        torch.testing.assert_close(fused_tail(made["z"], made["shortcut"], weights, True), expected)


class TestPrecision:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_large_mean(self, engine, train, layout):
        case = Case((4, 20, 20, 20), train=train, layout=layout, mean=1000.0, std=1.0, relu=False)
        made = make(case, torch.float32)
        exact, actual, modules = plain(case, made), tail_of(case, made), plain(case, made, torch.float32)
        last_place = 1000 * torch.finfo(torch.float32).eps  # what the mean leaves of a deviation of one
        for name in ("out", *LEAVES, "running_mean", "running_var"):
            largest = exact[name].abs().max()
            ours, theirs = ((found[name].double() - exact[name]).abs().max() / largest for found in (actual, modules))
            assert ours <= 3 * theirs + 3 * last_place, f"{name}: {ours:.3g}, batch norm {theirs:.3g}"

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("where", ["z", "shortcut", "kernel"])
    def test_nan_stays(self, engine, where, dtype, train, layout):
        case = Case((2, 9, 4, 5), train=train, layout=layout)
        made = make(case, dtype)
        made[where][(0, 4, 1, 2)[: made[where].dim()] if where != "kernel" else (0, 0, 1)] = float("nan")
        weights, _ = weights_of(case, made, made)
        expected, _ = plain_out(case, made, made, case.relu)
        assert expected.isnan().any()
        out = fused_tail(made["z"], made["shortcut"], weights, case.relu)
        assert torch.equal(out.isnan(), expected.isnan())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_saturated_gate(self, engine, dtype, sign):
        case = Case(train=False, relu=False, add=False)
        made = make(case, dtype)
        made["bias"] = torch.full_like(made["bias"], 1000.0 * sign)
        made["kernel"] = made["kernel"].abs() + 1
        weights, _ = weights_of(case, made, made)
        expected, _ = plain_out(case, made, made, relu=False)
        tolerance = {"rtol": 2 * TOLERANCES[dtype], "atol": 1e-30}
        torch.testing.assert_close(fused_tail(made["z"], None, weights, False), expected, **tolerance)

from math import exp
from typing import NamedTuple

import pytest
import torch
from timm.layers import EcaModule
from torch import nn

from timm_eca import EcaLayer
from timm_eca.fused import native, passes, tail
from timm_eca.fused.formula import Moments, Running, TailWeights, tail_formula
from timm_eca.fused.tail import fused_tail

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LEAVES = ("z", "shortcut", "weight", "bias", "kernel")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
BY_ENGINE = {"native": native, "passes": passes}


class Case(NamedTuple):
    """What a tail is made of, in few words."""

    shape: tuple[int, int, int, int] = (3, 9, 5, 7)
    kernel_size: int = 3
    train: bool = True
    affine: bool = True
    add: bool = True
    relu: bool = True
    drop: bool = False
    tracked: bool = True
    layout: torch.memory_format = torch.contiguous_format
    mean: float = 0.3
    std: float = 1.5
    eps: float = 1e-5
    momentum: float = 0.1
    seed: int = 0


@pytest.fixture(params=BY_ENGINE)
def engine(request, monkeypatch):
    """Make the passes of one engine be taken; the other's are not called."""
    if request.param == "native" and not native.loaded():
        pytest.skip("the compiled passes are not built here")
    if request.param == "passes":
        monkeypatch.setattr("timm_eca.fused.tail.native.takes", lambda *_: False)
    return request.param


def make(case: Case, dtype: torch.dtype, vectors: torch.dtype | None = None) -> dict[str, torch.Tensor | None]:
    """The tensors of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    vectors = vectors or dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, channels = case.shape[:2]
    level = case.mean * (1 + normal(1, channels, 1, 1) / 4)
    maps = {
        "z": level + case.std * (normal(*case.shape) + normal(batch, channels, 1, 1)),
        "shortcut": normal(*case.shape),
        "cotangent": normal(*case.shape),
    }
    kernel = normal(1, 1, case.kernel_size)
    rest = {"weight": normal(channels), "bias": normal(channels), "kernel": kernel}
    kept = {"running_mean": level.flatten() + normal(channels) / 4, "running_var": case.std**2 + normal(channels) ** 2}
    drop = torch.rand(batch, 1, generator=generator) < 0.6
    made: dict[str, torch.Tensor | None] = {
        name: t.to(dtype).contiguous(memory_format=case.layout) for name, t in maps.items()
    }
    made |= {name: t.to(vectors) for name, t in (rest | kept).items()}
    made["drop"] = (drop / 0.5).to(dtype) if case.drop else None
    if not case.add:
        made["shortcut"] = None
    if not case.affine:
        made["weight"] = made["bias"] = None
    return made


def leaves(made: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        name: made[name].detach().to(dtype or made[name].dtype).clone().requires_grad_()
        for name in LEAVES
        if made[name] is not None
    }


def finish(out: torch.Tensor, cotangent: torch.Tensor, inputs: dict, kept: tuple) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent)
    return {"out": out.detach(), **dict(zip(inputs, grads)), "running_mean": kept[0], "running_var": kept[1]}


def plain_out(case: Case, inputs: dict, made: dict, relu: bool) -> tuple[torch.Tensor, nn.BatchNorm2d]:
    """A tail out of modules, in the type of its inputs."""
    z, channels = inputs["z"], case.shape[1]
    norm = nn.BatchNorm2d(channels, case.eps, case.momentum, case.affine, case.tracked or not case.train).train(
        case.train
    )
    layer = EcaLayer(kernel_size=case.kernel_size)
    norm, layer = norm.to(z.dtype), layer.to(z.dtype)
    with torch.no_grad():
        for name in ("running_mean", "running_var") if norm.track_running_stats else ():
            getattr(norm, name).copy_(made[name])
    named = {"weight": inputs["weight"], "bias": inputs["bias"]} if case.affine else {}
    out = torch.func.functional_call(norm, named, (z,))
    out = torch.func.functional_call(layer, {"conv.weight": inputs["kernel"]}, (out,))
    if made["drop"] is not None:
        out = out * made["drop"].to(z.dtype)[..., None, None]
    if case.add:
        out = out + inputs["shortcut"]
    return (torch.relu(out) if relu else out), norm


def plain(case: Case, made: dict, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Everything a tail gives, by modules. The cotangent stays away from the ReLU's corner."""
    inputs = leaves(made, dtype)
    with torch.no_grad():
        ahead, _ = plain_out(case, leaves(made, torch.float64), made, relu=False)
        made["cotangent"] *= ahead.abs() > 0.05
    out, norm = plain_out(case, inputs, made, case.relu)
    nothing = torch.zeros(())
    kept = (norm.running_mean, norm.running_var) if norm.track_running_stats else (nothing, nothing)
    return finish(out, made["cotangent"].to(dtype), inputs, kept)


def weights_of(case: Case, inputs: dict, made: dict, gate: nn.Module | None = None) -> tuple[TailWeights, tuple]:
    kept = (made["running_mean"].clone(), made["running_var"].clone())
    weights = TailWeights(
        kernel=inputs["kernel"],
        gate=gate or nn.Sigmoid(),
        weight=inputs.get("weight"),
        bias=inputs.get("bias"),
        moments=None if case.train else Moments(*kept),
        running=Running(*kept, case.momentum) if case.train and case.tracked else None,
        drop=made["drop"],
        eps=case.eps,
    )
    nothing = torch.zeros(())
    return weights, (kept if case.tracked or not case.train else (nothing, nothing))


def tail_of(case: Case, made: dict, function=fused_tail) -> dict[str, torch.Tensor]:
    """Everything a tail gives, by the function under test."""
    inputs = leaves(made)
    weights, kept = weights_of(case, inputs, made)
    out = function(inputs["z"], inputs.get("shortcut"), weights, case.relu)
    return finish(out, made["cotangent"], inputs, kept)


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Compare relative to a tensor's largest magnitude, and to the largest gradient's where that is nearly zero."""
    assert actual.keys() == expected.keys()
    largest = max(expected[name].abs().max().item() for name in expected if name in LEAVES)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = max(value.abs().max().item(), 1e-2 * largest if name in LEAVES else 0.0)
        off = (actual[name].double() - value.double()).abs().max().item()
        assert off <= tolerance * scale, f"{name}: off by {off:.3g} where the largest is {scale:.3g}"


def check(case: Case, dtype: torch.dtype, vectors: torch.dtype | None = None, function=fused_tail) -> None:
    made = make(case, dtype, vectors)
    expected = plain(case, made)
    actual = tail_of(case, made, function)
    assert actual["out"].dtype == actual["z"].dtype == dtype
    assert actual["kernel"].dtype == (vectors or dtype)
    assert actual["out"].is_contiguous(memory_format=case.layout)
    assert_close(actual, expected, TOLERANCES[dtype])


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
        return fused_tail(z, shortcut, TailWeights(kernel, nn.Sigmoid(), *leaf[1:], **fields), relu), [*leaf, kernel]

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
        out = fused_tail(z, None, TailWeights(kernel, nn.Sigmoid(), None, None, moments, None, None, 0.0), False)
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
    def test_half_precision(self, train, layout, dtype, vectors):
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


class TestAutograd:
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
    @pytest.mark.parametrize(("z_strides", "other"), [("same", "other"), ("same", "sliced"), ("same", "expanded")])
    def test_layout_of_shortcut(self, engine, layout, z_strides, other):
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
        case = Case()
        made = make(case, torch.float64)
        inputs = leaves(made)
        weights, _ = weights_of(case, inputs, made)
        fused_tail(inputs["z"], inputs["shortcut"], weights, True)
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
        assert large == {inputs["z"].data_ptr(), out.data_ptr()} if relu else {inputs["z"].data_ptr()}
        assert sum(kept.values()) - len(large) * out.numel() <= 8 * 2 * 16

    def test_backward_twice_needs_the_graph(self, engine):
        case = Case()
        made = make(case, torch.float64)
        inputs = leaves(made)
        weights, _ = weights_of(case, inputs, made)
        out = fused_tail(inputs["z"], inputs["shortcut"], weights, True)
        first = torch.autograd.grad(out, inputs["z"], made["cotangent"], retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(out, inputs["z"], made["cotangent"])[0])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, inputs["z"], made["cotangent"])

    def test_changed_input_is_noticed(self, engine):
        case = Case()
        made = make(case, torch.float64)
        inputs = leaves(made)
        weights, _ = weights_of(case, inputs, made)
        out = fused_tail(inputs["z"], inputs["shortcut"], weights, True)
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


class TestEngines:
    @pytest.fixture
    def taken(self, monkeypatch):
        calls = []
        for name, module in BY_ENGINE.items():
            for kind in ("forward", "backward"):
                original = getattr(module, kind)
                monkeypatch.setattr(
                    module, kind, lambda *args, _o=original, _k=(name, kind), **kw: calls.append(_k) or _o(*args, **kw)
                )
        return calls

    def test_fixture_chooses(self, engine, taken):
        tail_of(Case(), make(Case(), torch.float32))
        assert taken == [(engine, "forward"), (engine, "backward")]

    @pytest.mark.parametrize("gate", [nn.Sigmoid(), EcaModule(8).gate], ids=["torch", "timm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_compiled_passes_taken(self, taken, gate, dtype):
        if not native.loaded():
            pytest.skip("the compiled passes are not built here")
        made = make(Case(), dtype)
        fused_tail(made["z"], made["shortcut"], weights_of(Case(), made, made, gate)[0], True)
        assert taken == [("native", "forward")]

    @pytest.mark.parametrize(
        ("dtype", "vectors", "gate"),
        [
            (torch.bfloat16, torch.bfloat16, nn.Sigmoid()),
            (torch.float16, torch.float32, nn.Sigmoid()),
            (torch.float32, torch.float64, nn.Sigmoid()),
            (torch.float32, torch.float32, nn.Hardsigmoid()),
        ],
    )
    def test_compiled_passes_left(self, taken, dtype, vectors, gate):
        made = make(Case(), dtype, vectors)
        fused_tail(made["z"], made["shortcut"], weights_of(Case(), made, made, gate)[0], True)
        assert taken == [("passes", "forward")]

    def test_compiled_passes_left_for_strided_vectors(self, taken):
        made = make(Case(), torch.float32)
        made["weight"] = torch.stack([made["weight"], made["weight"]], 1)[:, 0]
        weights, _ = weights_of(Case(), made, made)
        expected, _ = plain_out(Case(), made, made, relu=True)
        torch.testing.assert_close(fused_tail(made["z"], made["shortcut"], weights, True), expected)
        assert taken == [("passes", "forward")]

    def test_without_library(self, monkeypatch):
        monkeypatch.setattr(native, "_functions", {})
        assert not native.loaded()
        assert (
            tail._engine(
                torch.ones(1, 1, 1, 1),
                None,
                weights_of(Case(), make(Case(), torch.float32), make(Case(), torch.float32))[0],
            )
            is passes
        )

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_deterministic(self, engine, threads, train):
        case = Case((5, 130, 9, 8), train=train)
        made = make(case, torch.float32)
        first, again = tail_of(case, made), tail_of(case, made)
        assert all(torch.equal(first[name], again[name]) for name in first)

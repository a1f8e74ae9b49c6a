from functools import partial

import pytest
import torch

from fused_models import (
    MODELS,
    assert_same,
    blocks_of,
    compiler_calls_blocks,
    create,
    pixels,
    plain_twin,
    short,
    small,
    step,
)
from timm_eca.fused import native, tail
from timm_eca.fused.formula import Moments, Norm, Running, TailWeights, tail_formula
from timm_eca.fused.operators import operator_gains, operator_infer, operator_norm_pool

pytestmark = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")

operator_tail = partial(tail_formula, gains_of=operator_gains)


def make(
    shape=(3, 9, 5, 7), train=True, affine=True, add=True, drop=False, dtype=torch.float64
) -> tuple[torch.Tensor, torch.Tensor | None, TailWeights]:
    """A tail's tensors, leaves that require a gradient where they may."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch, channels = shape[:2]
    stats = normal(channels), normal(channels) ** 2 + 0.5
    weights = TailWeights(
        kernel=normal(1, 1, 3).requires_grad_(),
        gate=torch.sigmoid,
        weight=normal(channels).requires_grad_() if affine else None,
        bias=normal(channels).requires_grad_() if affine else None,
        moments=None if train else Moments(*stats),
        running=Running(*stats, 0.1) if train else None,
        drop=(normal(batch, 1) > 0).to(dtype) * 2 if drop else None,
        eps=1e-5,
    )
    return normal(*shape).requires_grad_(), normal(*shape).requires_grad_() if add else None, weights


def flat(weights: TailWeights) -> tuple:
    """The operator's arguments after the map."""
    mean, var = weights.moments or (None, None)
    return weights.weight, weights.bias, weights.kernel, mean, var, weights.drop, weights.eps


def all_of(tail, z, shortcut, weights, relu) -> list[torch.Tensor]:
    """A tail's output, gradients and statistics."""
    kept = tuple(t.clone() for t in (weights.running or ())[:2])
    if kept:
        weights = weights._replace(running=Running(*kept, weights.running.factor))
    out = tail(z, shortcut, weights, relu)
    leaves = [t for t in (z, shortcut, weights.weight, weights.bias, weights.kernel) if t is not None]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent), *kept]


CASES = {
    "train": {},
    "eval": {"train": False},
    "no affine": {"affine": False},
    "no shortcut": {"add": False},
    "drop path": {"drop": True},
    "a pixel": {"shape": (2, 5, 1, 1), "train": False},
}


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("case", CASES)
class TestOperator:
    def test_is_the_formula(self, case, relu):
        found = all_of(operator_tail, *make(**CASES[case]), relu)
        for actual, expected in zip(found, all_of(tail_formula, *make(**CASES[case]), relu)):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
class TestContracts:
    def test_gains(self, case):
        z, _, weights = make(**CASES[case])
        torch.library.opcheck(torch.ops.timm_eca.gains.default, (z, *flat(weights)))

    def test_graph_infer(self, case):
        z, shortcut, weights = make(**CASES[case])
        weights = weights._replace(moments=weights.moments or Moments(*weights.running[:2]))
        *vectors, eps = flat(weights)
        given = (z, shortcut, *vectors, *[None] * 5, eps, 0.0, True)
        given = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
        torch.library.opcheck(torch.ops.timm_eca.graph_infer_.default, given)

    def test_gains_backward(self, case):
        z, _, weights = make(**CASES[case])
        z, weights = z.detach(), weights._replace(moments=weights.moments or Moments(*weights.running[:2]))
        vectors = [torch.randn_like(z[:, :, 0, 0]) for _ in range(3)]
        given = [t.detach() if isinstance(t, torch.Tensor) else t for t in flat(weights)]
        torch.library.opcheck(torch.ops.timm_eca.gains_backward.default, (*vectors, *given, 12, True))

    def test_derivatives(self, case):
        z, _, weights = make(**CASES[case])
        leaves = [t for t in (z, weights.weight, weights.bias, weights.kernel) if t is not None]

        def gains(z, *vectors):
            given = iter(vectors)
            names = [name for name in ("weight", "bias", "kernel") if getattr(weights, name) is not None]
            pooled, _, scale, offset = operator_gains(z, weights._replace(**{name: next(given) for name in names}))
            # The pool is a constant there: what depends on it is in the offset, which the tail needs with it.
            return (z - pooled[..., None, None]) * scale[..., None, None] + offset[..., None, None]

        assert torch.autograd.gradcheck(gains, leaves)


class TestLayouts:
    @pytest.mark.parametrize("shortcut_as", ["nchw", "nhwc"])
    @pytest.mark.parametrize("z_as", ["nchw", "nhwc", "slice", "transposed"])
    def test_any(self, z_as, shortcut_as):
        ways = {
            "nchw": lambda t: t.contiguous(),
            "nhwc": lambda t: t.contiguous(memory_format=torch.channels_last),
            "slice": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
            "transposed": lambda t: t.mT.contiguous().mT,
        }
        z, shortcut, weights = make()
        expected = all_of(tail_formula, z, shortcut, weights, True)
        z, shortcut = (ways[way](t.detach()).requires_grad_() for way, t in ((z_as, z), (shortcut_as, shortcut)))
        for actual, wanted in zip(all_of(operator_tail, z, shortcut, weights, True), expected):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)
        torch.library.opcheck(torch.ops.timm_eca.gains.default, (z, *flat(weights)))


@pytest.mark.parametrize("z_as", ["nchw", "nhwc", "slice"])
@pytest.mark.parametrize("norm", [True, False], ids=["shortcut's norm", "as it is"])
def test_inference_in_place(z_as, norm):
    z, shortcut, weights = make(train=False)
    other = Norm(weights.weight, weights.bias, *weights.moments, 0.1) if norm else None
    weights = weights._replace(shortcut_norm=other)
    layout = torch.channels_last if z_as == "nhwc" else torch.contiguous_format
    room = torch.nn.functional.pad(z.detach(), (1, 2)) if z_as == "slice" else z.detach().clone(memory_format=layout)
    own = room[..., 1:-2] if z_as == "slice" else room
    with torch.no_grad():
        expected = tail_formula(z, shortcut, weights, True)
        out = operator_infer(own, shortcut, weights, True)
    assert out is own
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    if z_as == "slice":
        assert not room[..., 0].any()
        assert not room[..., -2:].any()


def test_vectors_of_other_types_are_refused():
    z, shortcut, weights = make(train=False)
    weights = weights._replace(kernel=weights.kernel.float())
    with torch.no_grad(), pytest.raises(RuntimeError, match="graph_infer_ takes float32, float64 and bfloat16"):
        operator_infer(z.detach(), shortcut, weights, True)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("z_as", ["nchw", "nhwc", "slice"])
def test_sums_in_place(z_as, size):
    z, _, weights = make(train=False)
    norm = Norm(weights.weight, weights.bias, *weights.moments, weights.eps)
    conv = torch.nn.Conv2d(z.shape[1], 7, size, padding=size // 2).double()
    layout = torch.channels_last if z_as == "nhwc" else torch.contiguous_format
    room = torch.nn.functional.pad(z.detach(), (1, 2)) if z_as == "slice" else z.detach().clone(memory_format=layout)
    own = room[..., 1:-2] if z_as == "slice" else room
    with torch.no_grad():
        expected = torch.relu(torch.nn.functional.batch_norm(z, *weights.moments, *norm[:2], eps=norm.eps))
        pooled = operator_norm_pool(own, norm, 1, conv.weight, conv.bias)
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pooled, conv(expected).mean((2, 3)), rtol=1e-12, atol=1e-12)
    if z_as == "slice":
        assert not room[..., 0].any()
        assert not room[..., -2:].any()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="graph_norm_pool_ takes float32 or float64, and"),
    ):
        operator_norm_pool(own, norm, 1, conv.weight.float(), None)


def graph_of(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """What a model's graph calls."""
    targets = []

    def watch(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend=watch)(pixels(dtype=dtype))
    return targets


@pytest.mark.usefixtures("all_maps_large")
class TestGraphs:
    @compiler_calls_blocks
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_graph_calls_it_once_a_block(self, train):
        model = small(drop_path_rate=0.3).train(train)
        assert sum("timm_eca.gains" in target for target in graph_of(model, torch.float32)) == len(blocks_of(model))

    @compiler_calls_blocks
    def test_of_small_maps_they_are_the_compilers(self, monkeypatch):
        model = small(layers=(1, 1, 1, 1)).train()
        monkeypatch.setattr(tail, "_SMALL", 2 * 48 * 8 * 8)  # what the second of its four blocks has
        assert sum("timm_eca.gains" in target for target in graph_of(model, torch.float32)) == 2

    @compiler_calls_blocks
    def test_inference(self):
        with torch.no_grad():
            targets = graph_of(model := small().eval(), torch.float32)
        called = [target.removeprefix("timm_eca.") for target in targets if "timm_eca" in target]
        # A bottleneck's two norms, of which the last may sum what the tail needs, and its tail.
        assert [name for name in called if name != "graph_norm_pool_"] == ["graph_infer_"] * called.count(
            "graph_infer_"
        )
        assert len(called) == 3 * len(blocks_of(model))

    @compiler_calls_blocks
    @pytest.mark.parametrize(("name", "narrow"), [("resnet18", {"channels": (8, 12, 16, 24)}), ("mobilenetv2_050", {})])
    def test_sums_of_other_blocks(self, name, narrow):
        model = create(name, **MODELS[name], **narrow).double().eval()
        with torch.no_grad():
            assert "timm_eca.graph_norm_pool_" in graph_of(model, torch.float64)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(pixels()), plain_twin(model)(pixels()), rtol=1e-12, atol=1e-12)

    def test_inference_of_small_maps_is_the_compilers(self, monkeypatch):
        monkeypatch.setattr(tail, "_SMALL_INFERENCE", 1 << 40)
        with torch.no_grad():
            assert not any("timm_eca" in target for target in graph_of(small().eval(), torch.float32))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("made", [small, short])
    def test_inference_by_inductor(self, made, layout):
        model = made(drop_path_rate=0.4).double().eval().to(memory_format=layout)
        x = pixels(2, 96).contiguous(memory_format=layout)
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True)
            for given in (x, 2 * x):
                torch.testing.assert_close(compiled(given), plain_twin(model)(given), rtol=1e-12, atol=1e-12)

    def test_half_precision_has_the_formula(self):
        model = small().bfloat16().eval()
        assert not any("timm_eca" in target for target in graph_of(model, torch.bfloat16))
        x = pixels(dtype=torch.bfloat16)
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    def test_inductor(self, layout):
        model = small(layers=(1, 1, 1, 2), channels=(8, 8, 8, 8)).double().train().to(memory_format=layout)
        plain = plain_twin(model)
        torch.compiler.reset()
        actual = step(torch.compile(model, fullgraph=True), pixels().contiguous(memory_format=layout))
        actual = {kind: {n.removeprefix("_orig_mod."): t for n, t in ts.items()} for kind, ts in actual.items()}
        assert_same(actual, step(plain, pixels()))

    def test_second_derivative_is_an_error(self):
        z, shortcut, weights = make()
        out = operator_tail(z, shortcut, weights, True)
        (grad,) = torch.autograd.grad(out.sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="has no derivative"):
            grad.sum().backward()

"""The compiled passes against those of PyTorch in double precision, where their loops are cut and rows are folded."""

import pytest
import torch
from torch import Tensor, nn

from timm_eca.fused import native, passes
from timm_eca.fused.formula import Act, Moments, Norm, Running, TailWeights, gains_of_map
from timm_eca.fused.operators import operator_gains

pytestmark = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
OF_BATCH = pytest.mark.parametrize("of_batch", [True, False], ids=["batch", "given"])
NHWC, NCHW = torch.channels_last, torch.contiguous_format


def maps_of(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, aligned: bool) -> list[Tensor]:
    """A map, a shortcut and a gradient, at odd addresses unless aligned."""
    generator = torch.Generator().manual_seed(sum(shape))
    level = 2 * torch.randn(1, shape[1], 1, 1, generator=generator, dtype=torch.float64)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) + level for _ in range(3)]
    maps = []
    for t in made:
        like = torch.empty_like(t, dtype=dtype).contiguous(memory_format=layout)
        room = torch.empty(t.numel() + 1, dtype=dtype)[0 if aligned else 1 :][: t.numel()]
        maps.append(room.as_strided(like.shape, like.stride(), room.storage_offset()).copy_(t))
    return maps


def weights_of(shape: tuple[int, ...], dtype: torch.dtype, of_batch: bool, kernel_size: int) -> TailWeights:
    generator = torch.Generator().manual_seed(kernel_size)
    batch, channels = shape[:2]
    weight, bias, mean, shift = torch.randn(4, channels, generator=generator, dtype=torch.float64)
    var = 0.5 + shift**2
    return TailWeights(
        kernel=torch.randn(1, 1, kernel_size, generator=generator, dtype=torch.float64).to(dtype),
        gate=torch.sigmoid,
        weight=weight.to(dtype),
        bias=bias.to(dtype),
        moments=None if of_batch else Moments(mean.to(dtype), var.to(dtype)),
        running=Running(mean.to(dtype), var.to(dtype), 0.1) if of_batch else None,
        drop=2 * (torch.rand(batch, 1, generator=generator) < 0.7).to(dtype),
        eps=1e-2,
    )


def doubled(weights: TailWeights) -> TailWeights:
    moments = weights.moments and Moments(*(t.double() for t in weights.moments))
    running = weights.running and Running(*(t.double() for t in weights.running[:2]), weights.running.factor)
    vectors = {name: getattr(weights, name).double() for name in ("kernel", "weight", "bias", "drop")}
    return weights._replace(**vectors, moments=moments, running=running)


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    of_batch: bool,
    kernel_size: int = 3,
    add: bool = True,
    relu: bool = True,
    inplace: bool = False,
    aligned: bool = True,
) -> None:
    """Run both passes, each with the same maps, and compare all that they give."""
    z, shortcut, grad = maps_of(shape, dtype, layout, aligned)
    weights = weights_of(shape, dtype, of_batch, kernel_size)
    exact = doubled(weights)
    other = shortcut if add else None
    out, pooled, moments = passes.forward(
        z.double(), None if other is None else other.double(), exact, relu, inplace=False
    )
    found = native.forward(z.clone() if inplace else z, other, weights, relu, inplace)
    assert (found[1] is None) == inplace
    kept = [(a, e) for a, e in zip((*found[:2], *found[2]), (out, pooled, *moments)) if a is not None]
    compare(*zip(*kept), dtype)
    if of_batch:
        compare(weights.running[:2], exact.running[:2], dtype)

    given = out.to(dtype) if relu else None  # an oracle's: the ReLU is to cut both at the same place
    rest = [True, True, True, True, of_batch]
    double = [t if t is None else t.double() for t in (grad, given, z, pooled)]
    expected = passes.backward(*double, exact._replace(moments=moments), [True, *rest])
    own = weights._replace(moments=Moments(*(t.to(dtype) for t in moments)))
    compare(native.backward(grad, given, z, pooled.to(dtype), own, [True, *rest]), expected, dtype)
    without_map = native.backward(grad, given, z, pooled.to(dtype), own, [False, *rest])
    assert without_map[0] is None
    compare(without_map[1:], expected[1:], dtype)


def compare(actual, expected, dtype: torch.dtype) -> None:
    for index, (a, e) in enumerate(zip(actual, expected)):
        assert a.dtype == dtype
        assert a.shape == e.shape
        off, largest = (a.double() - e).abs().max().item(), max(e.abs().max().item(), 1e-2)
        assert off <= TOLERANCES[dtype] * largest, f"{index}: off by {off:.3g} where the largest is {largest:.3g}"


class TestNarrowMaps:
    """NHWC: several pixels make a line, and the last line is shorter."""

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 16, 24, 33, 64, 96, 127, 128, 129, 130])
    @pytest.mark.parametrize("area", [(2, 1), (5, 3), (13, 11), (31, 29)], ids=str)
    def test_channels_and_areas(self, area, channels, of_batch, dtype):
        check((3, channels, *area), dtype, NHWC, of_batch)

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("rows", [63, 64, 65, 128])
    def test_full_lines(self, rows, of_batch, dtype):
        check((2, 32, rows, 8), dtype, NHWC, of_batch)

    @OF_BATCH
    @pytest.mark.parametrize("channels", [7, 16, 70, 130])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_threads(self, threads, batch, channels, of_batch):
        check((batch, channels, 73, 71), torch.float64, NHWC, of_batch)


class TestLongRows:
    """NCHW: a row is added up in several sums, and what is left of it by itself."""

    @DTYPES
    @pytest.mark.parametrize("kernel_size", [1, 3, 5, 9, 17, 23])
    @pytest.mark.parametrize("area", [(97, 99), (150, 149), (260, 255)], ids=str)
    def test_kernels(self, area, kernel_size, dtype):
        check((2, 8, *area), dtype, NCHW, of_batch=False, kernel_size=kernel_size)

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_threads(self, threads, batch):
        check((batch, 9, 150, 149), torch.float64, NCHW, of_batch=False, kernel_size=5)


@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
class TestBothLayouts:
    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("area", [(1, 1), (1, 3), (7, 7), (15, 17), (16, 16), (19, 15), (33, 31)], ids=str)
    def test_areas(self, area, of_batch, dtype, layout):
        check((2, 20, *area), dtype, layout, of_batch)

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("add", [True, False])
    @pytest.mark.parametrize("relu", [True, False])
    def test_in_place(self, relu, add, of_batch, dtype, layout):
        check((2, 24, 29, 31), dtype, layout, of_batch, add=add, relu=relu, inplace=True)

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("channels", [16, 23])
    def test_odd_addresses(self, channels, of_batch, dtype, layout):
        check((2, channels, 17, 19), dtype, layout, of_batch, aligned=False)

    @OF_BATCH
    @pytest.mark.parametrize("batch", [1, 3])
    def test_in_place_is_the_same(self, threads, batch, of_batch, layout):
        shape = (batch, 24, 57, 55)
        z, shortcut, _ = maps_of(shape, torch.float32, layout, aligned=True)
        weights = weights_of(shape, torch.float32, of_batch, 5)
        apart = native.forward(z, shortcut, weights, True, inplace=False)[0]
        assert torch.equal(native.forward(z, shortcut, weights, True, inplace=True)[0], apart)
        assert torch.equal(z, apart)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [3, 5], indirect=True)
@pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
class TestMoreThreadsThanSamples:
    """A sample's rows are split, its channels or NHWC its pixels, and the sums of pixels added up."""

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("inplace", [True, False], ids=["in place", "new"])
    @pytest.mark.parametrize("shape", [(1, 130, 37, 35), (2, 70, 33, 31), (4, 9, 73, 71)], ids=str)
    def test_parts(self, shape, inplace, of_batch, dtype, layout):
        check(shape, dtype, layout, of_batch, inplace=inplace)

    @OF_BATCH
    @pytest.mark.parametrize("shape", [(2, 70000, 1, 2), (2, 2, 280, 260)], ids=str)
    def test_fewer_rows_than_parts(self, shape, of_batch, layout):
        check(shape, torch.float64, layout, of_batch)


class TestShortcutsNorm:
    """The norm of a shortcut is applied as it is added."""

    @pytest.mark.parametrize("inplace", [True, False])
    @pytest.mark.parametrize("relu", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("shape", [(1, 70, 3, 5), (3, 24, 31, 29)], ids=str)
    def test_is_the_norm(self, threads, shape, of_batch, dtype, layout, affine, relu, inplace):
        z, shortcut, _ = maps_of(shape, dtype, layout, aligned=True)
        weights = weights_of(shape, dtype, of_batch, 3)
        norm = nn.BatchNorm2d(shape[1], eps=0.1, affine=affine).double().eval()
        generator = torch.Generator().manual_seed(0)
        for t in (*norm.parameters(), norm.running_mean, norm.running_var):
            t.data.uniform_(0.2, 2, generator=generator)
        exact = passes.forward(z.double(), norm(shortcut.double()), doubled(weights), relu, inplace=False)[0]
        norm = norm.to(dtype)
        own = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        for engine in (passes, native):
            given = weights._replace(shortcut_norm=own, running=None)
            with torch.no_grad():
                compare([engine.forward(z.clone(), shortcut, given, relu, inplace)[0]], [exact], dtype)


def vectors_of(weights: TailWeights) -> tuple:
    """An operator's arguments after its maps."""
    return weights.weight, weights.bias, weights.kernel, *(weights.moments or (None, None)), weights.drop, weights.eps


def gains_backward(dots: Tensor, total: Tensor, pooled: Tensor, weights: TailWeights, *rest: object) -> list[Tensor]:
    return torch.ops.timm_eca.gains_backward(dots, total, pooled, *vectors_of(weights), *rest)


class TestVectors:
    """What a compiled graph calls: the vectors alone, its loops do the rest."""

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("shape", [(3, 9, 5, 7), (1, 130, 73, 71), (5, 70, 12, 9)], ids=str)
    def test_gains(self, threads, shape, layout, of_batch, dtype):
        z = maps_of(shape, dtype, layout, aligned=False)[0]
        weights = weights_of(shape, dtype, of_batch, 3)
        found, expected = operator_gains(z, weights), gains_of_map(z.double(), doubled(weights))
        compare([found[0], *found[1], *found[2:]], [expected[0], *expected[1], *expected[2:]], dtype)

    @DTYPES
    @OF_BATCH
    @pytest.mark.parametrize("shape", [(3, 9, 5, 7), (1, 130, 73, 71)], ids=str)
    def test_gains_backward(self, threads, shape, of_batch, dtype):
        """The whole backward pass, of which they are a part, has its own oracle."""
        z, _, grad = maps_of(shape, dtype, NCHW, aligned=True)
        pooled, moments, scale, _ = operator_gains(z, weights_of(shape, dtype, of_batch, 3))
        weights = weights_of(shape, dtype, of_batch, 3)._replace(moments=moments)
        dz, _, *expected = native.backward(grad, None, z, pooled, weights, [True] * 5 + [of_batch])
        total, dots = grad.sum((2, 3)), (grad * (z - pooled[..., None, None])).sum((2, 3))
        area = z[0, 0].numel()
        shift, slope, *found = gains_backward(dots, total, pooled, weights, area, of_batch)
        rest = shift[..., None, None] + slope[:, None, None] * (z - moments.mean[:, None, None])
        compare([grad * scale[..., None, None] + rest, *found], [t.double() for t in (dz, *expected)], dtype)

    def test_given_are_not_written(self):
        weights = weights_of((2, 4, 3, 3), torch.float64, False, 3)
        dots, total, pooled = torch.randn(3, 2, 4, dtype=torch.float64).unbind()
        before = [t.clone() for t in (dots, total, pooled)]
        gains_backward(dots, total, pooled, weights, 9, False)
        assert all(torch.equal(t, b) for t, b in zip((dots, total, pooled), before))


class TestPooledBefore:
    @DTYPES
    @pytest.mark.parametrize("inplace", [True, False], ids=["in place", "new"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_map_is_not_pooled(self, threads, batch, inplace, dtype):
        shape = (batch, 6, 41, 37)
        z, shortcut, _ = maps_of(shape, dtype, NHWC, aligned=True)
        given = torch.linspace(-1, 1, 6 * batch).view(batch, 6).to(dtype)
        weights = weights_of(shape, dtype, False, 3)._replace(pooled=given)
        exact = doubled(weights)._replace(pooled=given.double())
        expected, *_ = passes.forward(z.double(), shortcut.double(), exact, True, inplace=False)
        found, pooled, _ = native.forward(z, shortcut, weights, True, inplace)
        compare([found], [expected], dtype)
        assert pooled is given


class TestNothing:
    """What is not there, or not asked for, is None, as an empty tensor takes as long to make as any."""

    @OF_BATCH
    @pytest.mark.parametrize("inplace", [True, False], ids=["in place", "new"])
    @pytest.mark.parametrize("gated", [True, False])
    def test_results(self, gated, inplace, of_batch):
        weights = weights_of((2, 4, 3, 3), torch.float64, of_batch, 3)
        vectors = weights.weight, weights.bias, weights.kernel if gated else None, *(weights.moments or (None, None))
        found = native.train(torch.randn(2, 4, 3, 3).double(), None, (*vectors, None), None, 1e-5, Act.RELU, inplace)
        assert [t is not None for t in found] == [not inplace, gated, of_batch, of_batch]

    @pytest.mark.parametrize("act", [Act.NONE, Act.RELU])
    @pytest.mark.parametrize("for_z", [True, False])
    @pytest.mark.parametrize("gated", [True, False])
    def test_gradients(self, gated, for_z, act):
        weights = weights_of((2, 4, 3, 3), torch.float64, False, 3)
        grad, z = torch.randn(2, 2, 4, 3, 3).double().unbind()
        vectors = weights.weight, weights.bias, weights.kernel if gated else None, *weights.moments
        saved = None if act == Act.NONE else z.relu(), z, z.mean((2, 3)) if gated else None, *vectors, None
        found = native.gradients_of(grad, saved, 1e-5, act, True, for_z)
        shortcut = gated or act == Act.NONE
        assert [t is not None for t in found] == [for_z, shortcut, True, True, gated]


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Compare each element of a map of bfloat16, which has eight digits, with what it would be unrounded."""
    assert actual.dtype == torch.bfloat16
    off = (actual.double() - expected).abs()
    assert (off <= 2**-8 * expected.abs() + 2e-5 * expected.abs().max()).all()


class TestBFloat16:
    """Maps of half precision: what is computed is float32, and rounded once."""

    @OF_BATCH
    @pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=["mixed", "all half"])
    @pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize(
        ("shape", "add", "relu"),
        [((3, 24, 31, 29), True, True), ((2, 130, 5, 7), True, False), ((1, 7, 17, 16), False, False)],
        ids=str,
    )
    def test_is_the_tail(self, threads, shape, add, relu, layout, vectors, of_batch):
        z, shortcut, grad = maps_of(shape, torch.bfloat16, layout, aligned=False)
        weights = weights_of(shape, vectors, of_batch, 5)
        exact, other = doubled(weights), shortcut if add else None
        out, pooled, moments = passes.forward(z.double(), None if other is None else other.double(), exact, relu, False)
        for inplace in (False, True):
            own = weights_of(shape, vectors, of_batch, 5)
            found = native.forward(z.clone() if inplace else z, other, own, relu, inplace)
            assert_rounded_once(found[0], out)
        if of_batch:
            compare(found[2], moments, torch.float32)
            for statistic, updated in zip(own.running[:2], exact.running[:2]):
                assert statistic.dtype == vectors
                torch.testing.assert_close(statistic, updated.to(vectors), rtol=2**-8, atol=1e-5)

        given = out.bfloat16() if relu else None
        wanted = [True, True, True, True, True, of_batch]
        double = [t if t is None else t.double() for t in (grad, given, z)]
        expected = passes.backward(*double, pooled, exact._replace(moments=moments), wanted)
        own = own._replace(moments=Moments(*(t.float() for t in moments)))
        actual = native.backward(grad, given, z, pooled.float(), own, wanted)
        for a, e in zip(actual[:2], expected[:2]):
            assert_rounded_once(a, e)
        for a, e in zip(actual[2:], expected[2:]):
            assert a.dtype == vectors
            assert (a.double() - e).abs().max() <= (2e-5 if vectors == torch.float32 else 2**-8) * e.abs().max()

    @pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
    def test_rounds_as_pytorch_does(self, layout):
        """With a mean of zero and a factor of one the tail is a sum, which float32 has exactly."""
        half = torch.randn(1, 16, 40, 50, generator=torch.Generator().manual_seed(4)).bfloat16()
        z = torch.cat([half, -half], 3).contiguous(memory_format=layout)
        shortcut = (1.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).bfloat16()).bfloat16()
        shortcut[0, 3, 4, :5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.39e38, -0.0]).bfloat16()
        one, zero = torch.ones(16), torch.zeros(16)
        weights = TailWeights(
            torch.zeros(1, 1, 3), torch.sigmoid, 2 * one, zero, Moments(zero, one), None, None, 0.0
        )  # the gate is a half
        out = native.forward(z, shortcut.contiguous(memory_format=layout), weights, False, False)[0]
        expected = (z.float() + shortcut.float()).bfloat16()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert out.isnan().sum() == 1

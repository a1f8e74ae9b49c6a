"""The kernels for GPUs: run on one where there is one, else interpreted on the CPU, and compiled for two kinds."""

import importlib.util

import pytest
import torch
from torch import Tensor

from fused_models import MODELS, blocks_of, check_step, create, pixels, small
from tail_cases import Case, check, make, weights_of
from timm_eca.fused import fuse_, gpu, passes
from timm_eca.fused.formula import Moments, Norm, Running, TailWeights, vector_dtype

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
OF_BATCH = pytest.mark.parametrize("of_batch", [True, False], ids=["batch", "given"])


def on(device: str, value, dtype: torch.dtype | None = None):
    """Tensors, and those in tuples, on a device and of a type; what is no tensor stays."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if isinstance(value, tuple):
        made = [on(device, v, dtype) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def random_weights(shape: tuple[int, ...], of_batch: bool, kernel_size: int, drop: bool, affine: bool) -> TailWeights:
    generator = torch.Generator().manual_seed(kernel_size)
    weight, bias, mean, shift = torch.randn(4, shape[1], generator=generator)
    moments = Moments(mean, 0.5 + shift**2)
    return TailWeights(
        kernel=torch.randn(1, 1, kernel_size, generator=generator),
        gate=torch.sigmoid,
        weight=weight if affine else None,
        bias=bias if affine else None,
        moments=None if of_batch else moments,
        running=Running(mean.clone(), 0.5 + shift**2, 0.1) if of_batch else None,
        drop=2 * (torch.rand(shape[0], 1, generator=generator) < 0.7).float() if drop else None,
        eps=1e-2,
    )


def compare(actual, expected, dtype: torch.dtype) -> None:
    for index, (a, e) in enumerate(zip(actual, expected)):
        assert (a is None) == (e is None), index
        if a is not None:
            assert a.shape == e.shape
            off, largest = (a.cpu().double() - e).abs().max().item(), max(e.abs().max().item(), 1e-2)
            assert off <= TOLERANCES[dtype] * largest, f"{index}: off by {off:.3g} where the largest is {largest:.3g}"


def agree(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    of_batch: bool = True,
    add: bool = True,
    relu: bool = True,
    inplace: bool = False,
    kernel_size: int = 5,
    drop: bool = False,
    affine: bool = True,
    norm: Norm | None = None,
) -> None:
    """Run the kernels, and in double precision the passes of PyTorch, on the same values; compare all they give."""
    generator = torch.Generator().manual_seed(sum(shape))
    level = 2 * torch.randn(1, shape[1], 1, 1, generator=generator)
    maps = [(torch.randn(shape, generator=generator) + level).to(dtype) for _ in range(3)]
    z, shortcut, grad = (t.contiguous(memory_format=layout) for t in maps)
    shortcut = shortcut if add else None
    weights = random_weights(shape, of_batch, kernel_size, drop, affine)._replace(shortcut_norm=norm)
    exact, own = on("cpu", weights, torch.float64), on(DEVICE, weights, vector_dtype(z))
    out, pooled, moments = passes.forward(z.double(), on("cpu", shortcut, torch.float64), exact, relu, inplace=False)
    given = on(DEVICE, z).clone(memory_format=torch.preserve_format)
    found = gpu.forward(given, on(DEVICE, shortcut), own, relu, inplace)
    assert (found[0] is given) == inplace
    assert found[0].dtype == dtype
    assert found[0].is_contiguous(memory_format=layout)
    compare([found[0], found[1], *found[2]], [out, pooled, *moments], dtype)
    if of_batch:
        compare(own.running[:2], exact.running[:2], dtype)

    after = out.to(dtype) if relu else None  # an oracle's: the ReLU is to cut both at the same place
    wanted = [True, add, affine, affine, True, of_batch]
    double = [on("cpu", t, torch.float64) for t in (grad, after, z, pooled)]
    expected = passes.backward(*double, exact._replace(moments=moments, shortcut_norm=None), wanted)
    own = own._replace(moments=on(DEVICE, moments, vector_dtype(z)))
    maps = on(DEVICE, (grad, after, z))
    compare(gpu.backward(*maps, on(DEVICE, pooled, vector_dtype(z)), own, wanted), expected, dtype)


class TestKernels:
    """Sizes at which loops go round more than once, tiles are cut, and maps are split."""

    @LAYOUTS
    @OF_BATCH
    @pytest.mark.parametrize("shape", [(2, 3, 41, 40), (3, 130, 5, 9), (1, 17, 64, 36), (2, 1, 2, 1)])
    def test_sizes(self, shape, of_batch, layout):
        agree(shape, layout=layout, of_batch=of_batch)

    def test_large_batch(self):
        agree((66, 20, 3, 1))

    @LAYOUTS
    @OF_BATCH
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_types(self, dtype, of_batch, layout):
        agree((3, 40, 9, 8), dtype, layout, of_batch, drop=True)

    @OF_BATCH
    @pytest.mark.parametrize(
        "changed",
        [
            {"relu": False},
            {"add": False, "relu": False},
            {"add": False},
            {"affine": False},
            {"inplace": True},
            {"inplace": True, "relu": False, "layout": torch.channels_last},
            {"kernel_size": 1},
            {"kernel_size": 23},
        ],
        ids=str,
    )
    def test_variants(self, changed, of_batch):
        agree((3, 20, 6, 5), of_batch=of_batch, **changed)

    @LAYOUTS
    @pytest.mark.parametrize("affine", [True, False])
    def test_norm_of_shortcut(self, affine, layout):
        vectors = torch.rand(4, 20, generator=torch.Generator().manual_seed(3)) + 0.2
        norm = Norm(*(vectors[:2] if affine else (None, None)), *vectors[2:], 0.1)
        agree((3, 20, 6, 5), layout=layout, of_batch=False, norm=norm)

    @pytest.mark.parametrize("vectors", [None, torch.float32], ids=["all half", "float32 weights"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.skipif(DEVICE == "cuda", reason="interpreted, the modules beside it are on the CPU")
    def test_weights_of_another_type(self, interpreted, train, dtype, vectors, monkeypatch):
        monkeypatch.setattr(passes, "forward", None)
        check(Case((4, 20, 6, 5), train=train, drop=True), dtype, vectors)

    def test_same_each_time(self):
        z = torch.randn((5, 40, 9, 8), device=DEVICE)
        weights = on(DEVICE, random_weights(z.shape, False, 5, False, True))
        found = [gpu.backward(z, z, z, z.mean((2, 3)), weights, [True] * 6) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found))

    def test_mean_already_known(self):
        z = torch.randn((2, 6, 4, 4), device=DEVICE)
        weights = on(DEVICE, random_weights(z.shape, False, 3, False, True))._replace(pooled=z.mean((2, 3)) + 1)
        out, pooled, _ = gpu.forward(z, None, weights, relu=False, inplace=False)
        assert pooled is weights.pooled
        torch.testing.assert_close(out, passes.forward(z, None, weights, relu=False, inplace=False)[0])


class TestModels:
    def test_interpreted(self, interpreted, monkeypatch):
        monkeypatch.setattr(passes, "forward", None)
        check_step(small().double(), pixels())

    @pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
    @LAYOUTS
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", MODELS)
    def test_on_gpu(self, fused_calls, name, train, layout):
        model = create(name, **MODELS[name]).double().train(train).to(DEVICE, memory_format=layout)
        if name.startswith("eca"):
            fuse_(model)
        check_step(model, pixels(3).to(DEVICE, memory_format=layout))
        assert len(fused_calls) == len(blocks_of(model)) > 0


class TestLayout:
    @pytest.mark.parametrize(
        ("shape", "nhwc", "splits"),
        [
            ((256, 256, 56, 56), True, 1),  # enough programs without
            ((8, 256, 56, 56), True, 32),
            ((1, 64, 112, 112), True, 392),
            ((1, 64, 37, 37), True, 37),  # all of one size
            ((1, 2048, 7, 7), True, 1),
            ((8, 256, 56, 56), False, 1),
        ],
    )
    def test_splits(self, shape, nhwc, splits):
        layout = gpu._layout(shape[0], shape[1], shape[2] * shape[3], nhwc)
        assert layout.splits == splits
        assert layout.area % splits == 0
        assert layout.block_c * layout.block_s <= gpu._TILE


class TestTakes:
    def test_not_a_cpu(self):
        made = make(Case(), torch.float32)
        weights, _ = weights_of(Case(), made, made)
        assert not gpu.takes(made["z"], made["shortcut"], weights)

    @pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
    def test_where_triton_cannot_compile(self):
        there = (torch.device("cuda:0"), torch.float32, False)
        gpu._proven.cache_clear()
        with pytest.warns(UserWarning, match="as PyTorch's operations on cuda:0, slower than they could, because"):
            assert not gpu._proven(*there)
        assert not gpu._proven(*there)  # and does not say so again
        gpu._proven.cache_clear()

    @pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
    def test_gpu(self):
        made = {name: on(DEVICE, t) for name, t in make(Case(), torch.float32).items()}
        weights, _ = weights_of(Case(), made, made)
        assert gpu.takes(made["z"], made["shortcut"], weights)
        assert not gpu.takes(made["z"], made["shortcut"].half(), weights)
        assert not gpu.takes(made["z"], made["shortcut"], on("cpu", weights))


class TestCompiled:
    """Triton compiles for GPUs that are not there."""

    @pytest.mark.parametrize(("capability", "dtype"), [(80, "float32"), (90, "bfloat16")])
    def test_for_other_gpus(self, run_python, tmp_path, repository, capability, dtype):
        env = {
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": f"{repository}:{repository}/tests",
        }
        code = f"import torch; from compiled_kernels import report; report({capability}, torch.{dtype})"
        told = [line.split() for line in run_python(code, **env).splitlines()]
        assert len(told) == 2 * (8 + 7)
        of_maps = [stack for name, stack, _ in told if name in ("pool", "sums", "write", "write_grad")]
        assert of_maps == ["0"] * 16, "registers are spilled"
        writing = [wide for name, _, wide in told if name in ("write", "write_grad")]
        assert writing == ["True"] * 8, "maps are not read and written 16 bytes at a time"

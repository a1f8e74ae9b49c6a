"""The trial that the kernels for GPUs have to pass where they are first used."""

import pytest
import torch

from timm_eca.fused import gpu, native, passes
from timm_eca.fused.formula import Moments
from timm_eca.fused.trial import try_passes

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
KERNELS = ["gains", "gate_backward", "moments", "norm_backward", "pool", "sums", "write", "write_grad"]
LAYOUTS = pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])


@DTYPES
@LAYOUTS
def test_right_passes(dtype, nhwc):
    try_passes(passes.forward, passes.backward, CPU, dtype, nhwc)


@LAYOUTS
@pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")
def test_compiled_passes(nhwc):
    try_passes(native.forward, native.backward, CPU, torch.float32, nhwc)


@DTYPES
@pytest.mark.parametrize("spoiled", range(9))
def test_each_result_counts(dtype, spoiled):
    """One element of one result that is off is found."""

    def off(index, result):
        if index == spoiled:
            result = result.clone()
            result.view(-1)[-1] += 0.5 * result.abs().max()
        return result

    def forward(*args):
        out, pooled, moments = passes.forward(*args)
        if args[-1]:  # in place: tried by itself
            return out, pooled, moments
        out, pooled, *moments = (off(i, t) for i, t in enumerate((out, pooled, *moments)))
        return out, pooled, Moments(*moments)

    def backward(*args):
        return [off(4 + i, t) for i, t in enumerate(passes.backward(*args))]

    with pytest.raises(AssertionError, match="not close"):
        try_passes(forward, backward, CPU, dtype, nhwc=False)


@pytest.mark.parametrize("ignored", ["shortcut_norm", "drop"])
def test_each_part_of_inference_counts(ignored):
    def forward(z, shortcut, weights, relu, inplace):
        return passes.forward(z, shortcut, weights._replace(**{ignored: None}) if inplace else weights, relu, inplace)

    with pytest.raises(AssertionError, match="not close"):
        try_passes(forward, passes.backward, CPU, torch.float32, nhwc=False)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")])
def test_wherever_it_is_called(context):
    state = torch.random.get_rng_state()
    with context():
        try_passes(passes.forward, passes.backward, CPU, torch.float32, nhwc=True)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def tried_anew():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a GPU, and does not interpret")
    gpu._proven.cache_clear()
    yield
    gpu._proven.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "nhwc"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, True)],
    ids=str,
)
def test_kernels(tried_anew, dtype, nhwc):
    assert gpu._proven(CPU, dtype, nhwc)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_counts(tried_anew, monkeypatch, kernel):
    """A kernel that does nothing is found, and said so once; PyTorch's operations go on."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    class Kernels:
        def __getattr__(self, name):
            return Nothing() if name == kernel else getattr(real, name)

    real = gpu._kernels()
    assert kernel in real.__all__
    monkeypatch.setattr(gpu, "_kernels", Kernels)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # not what an earlier trial left in memory
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with pytest.warns(UserWarning, match=r"of torch\.float32 run as PyTorch's operations on cpu, .* AssertionError"):
        assert not gpu._proven(CPU, torch.float32, False)
    assert not gpu._proven(CPU, torch.float32, False)

"""The compiled passes of a fused tail on a GPU: the kernels of `_kernels.py`, which Triton compiles when first called.

They are on a GPU what `native.py` is on a CPU. Triton comes with PyTorch's builds for GPUs. Before they are used on a
GPU they are tried there; where Triton is missing, cannot compile, or what it makes computes something else, the passes
of PyTorch do the same.
"""

import warnings
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formula import Moments, Norm, TailWeights, layout_of, update_running, vector_dtype
from .trial import try_passes

__all__ = ["backward", "forward", "takes"]

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_TILE = 2048  # elements of a map that a program has at a time
_ENOUGH = 1024  # programs that keep a large GPU busy
_CHANNELS = 128  # of a program that goes through one sample's vectors
_BATCH = {"block_b": 64, "block_c": 16}  # samples and channels of one that goes through a batch's
_NO_NORM = Norm(None, None, None, None, 0.0)  # type: ignore[arg-type]


def takes(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> bool:
    """Whether the kernels take a map, a shortcut of its type and vectors: all on one GPU, where they are right."""
    if not z.is_cuda or z.dtype not in _DTYPES or z[0].numel() >= 1 << 31 or weights.kernel is None:
        return False
    kernel, _, weight, bias, moments, _, drop, _, shortcut_norm, pooled = weights
    for t in (kernel, weight, bias, *(moments or ()), drop, pooled, *(shortcut_norm or ())[:4]):
        if t is not None and not (t.dtype in _DTYPES and t.device == z.device and t.is_contiguous()):
            return False
    fits = shortcut is None or (shortcut.dtype == z.dtype and shortcut.device == z.device and shortcut.shape == z.shape)
    return fits and _proven(z.device, z.dtype, not z.is_contiguous())


@cache
def _proven(device: torch.device, dtype: torch.dtype, nhwc: bool) -> bool:
    """Whether Triton compiles the kernels for a GPU, and they compute there what they are to, tried once."""
    try:
        try_passes(forward, backward, device, dtype, nhwc)
    except torch.OutOfMemoryError:  # which says nothing of the kernels
        raise
    except Exception as error:  # of many kinds
        warnings.warn(
            f"timm_eca: fused tails of {dtype} run as PyTorch's operations on {device}, slower than they could, because"
            f" a trial of Triton's kernels ended there in {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


@cache
def _kernels() -> Any:
    return import_module(f"{__package__}._kernels")  # imports Triton, so not before it is needed


class _Layout(NamedTuple):
    """A map as the kernels see it: sizes, memory format, and the tile of a program."""

    samples: int
    channels: int
    area: int
    nhwc: bool
    block_c: int
    block_s: int
    splits: int

    @classmethod
    def of(cls, z: Tensor) -> "_Layout":
        samples, channels, height, width = z.shape
        return _layout(samples, channels, height * width, not z.is_contiguous())

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"channels": self.channels, "nhwc": self.nhwc, "block_c": self.block_c, "block_s": self.block_s}

    @property
    def by_sample(self) -> tuple[int, int]:
        """Programs of which each goes through a split of a sample."""
        return self.samples * self.splits, -(-self.channels // self.block_c)

    @property
    def by_tile(self) -> tuple[int]:
        return (self.samples * -(-self.channels // self.block_c) * -(-self.area // self.block_s),)

    @property
    def by_row(self) -> tuple[int, int]:
        """Programs of which each has some channels of one sample's vectors."""
        return self.samples, -(-self.channels // _CHANNELS)

    @property
    def by_column(self) -> tuple[int]:
        """Programs of which each has some channels of the batch's vectors."""
        return (-(-self.channels // _BATCH["block_c"]),)


@cache
def _layout(samples: int, channels: int, area: int, nhwc: bool) -> _Layout:
    if nhwc:
        block_c = min(_power_of_two(channels), 64)
        block_s = min(_power_of_two(area), _TILE // block_c)
    else:
        block_s = min(_power_of_two(area), _TILE // 2)
        block_c = min(_power_of_two(channels), _TILE // block_s)
    # Some pixels of an NHWC map are a map of their own. All splits are of one size, so that their means count alike.
    programs = samples * -(-channels // block_c)
    most = max(1, min(_ENOUGH // programs, area // block_s)) if nhwc else 1
    splits = max(n for n in range(1, most + 1) if area % n == 0)
    return _Layout(samples, channels, area, nhwc, block_c, block_s, splits)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@torch.no_grad()
def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor, Moments]:
    """As `passes.forward`."""
    layout = _Layout.of(z)
    with torch.cuda.device_of(z):
        pooled, moments = _statistics(z, weights, layout)
        update_running(weights.running, moments, z)
        scale, offset = torch.empty_like(pooled), torch.empty_like(pooled)
        norm = (*moments, weights.weight, weights.bias, weights.kernel, weights.drop)
        _kernels().gains[layout.by_row](pooled, *norm, scale, offset, **_vector_constants(weights, layout))
        out = z if inplace else torch.empty_like(z)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=layout_of(z))
        *of_shortcut, shortcut_eps = weights.shortcut_norm or _NO_NORM
        maps = (z, shortcut, out, pooled, scale, offset, *of_shortcut, layout.area)
        _kernels().write[layout.by_tile](*maps, relu=relu, shortcut_eps=shortcut_eps, **layout.constants)
    return out, pooled, moments


def _statistics(z: Tensor, weights: TailWeights, layout: _Layout) -> tuple[Tensor, Moments]:
    """Return the mean of each sample's channels (B, C), and the moments to norm by."""
    if weights.moments is not None:
        pooled = _pool(z, layout, spread=False)[0] if weights.pooled is None else weights.pooled
        return _of_samples(pooled, layout, "mean"), weights.moments
    pooled, spread = _pool(z, layout, spread=True)
    mean, var = (pooled.new_empty(layout.channels) for _ in range(2))
    sizes = {"channels": layout.channels, **_BATCH}
    _kernels().moments[layout.by_column](pooled, spread, mean, var, len(pooled), **sizes)
    return _of_samples(pooled, layout, "mean"), Moments(mean, var)


def _pool(z: Tensor, layout: _Layout, spread: bool) -> tuple[Tensor, Tensor | None]:
    """Return the mean of each split's channels, and their variance if asked for."""
    pooled = z.new_empty((layout.samples * layout.splits, layout.channels), dtype=vector_dtype(z))
    variance = torch.empty_like(pooled) if spread else None
    _kernels().pool[layout.by_sample](z, pooled, variance, layout.area // layout.splits, **layout.constants)
    return pooled, variance


def _of_samples(vectors: Tensor, layout: _Layout, how: str) -> Tensor:
    """Return the mean or the sum over each sample's splits."""
    if len(vectors) == layout.samples:
        return vectors
    return getattr(vectors.view(layout.samples, -1, layout.channels), how)(1)


def _vector_constants(weights: TailWeights, layout: _Layout) -> dict[str, Any]:
    assert weights.kernel is not None
    sizes = {"channels": layout.channels, "size": weights.kernel.numel(), "block_c": _CHANNELS}
    return {"eps": weights.eps, **sizes}


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`."""
    layout = _Layout.of(z)
    with torch.cuda.device_of(z):
        masked = grad if out is None else torch.empty_like(z)
        total, dots = _sums(grad, out, z, masked, pooled, layout)
        of_map, of_weights = _vectors_backward(dots, total, pooled, weights, wanted[5], layout)
        dz = torch.empty_like(z) if wanted[0] else None
        if dz is not None:
            _kernels().write_grad[layout.by_tile](masked, z, dz, *of_map, layout.area, **layout.constants)
    return [gradient if want else None for gradient, want in zip((dz, masked, *of_weights), wanted)]


def _sums(
    grad: Tensor, out: Tensor | None, z: Tensor, masked: Tensor, pooled: Tensor, layout: _Layout
) -> tuple[Tensor, ...]:
    """Return the sums (B, C) over the map of the gradient below the ReLU, and of it times the map less its mean."""
    found = [pooled.new_empty((layout.samples * layout.splits, layout.channels)) for _ in range(2)]
    sizes = (layout.area // layout.splits, layout.splits)
    _kernels().sums[layout.by_sample](grad, out, z, masked, pooled, *found, *sizes, **layout.constants)
    return tuple(_of_samples(t, layout, "sum") for t in found)


def _vectors_backward(
    dots: Tensor, total: Tensor, pooled: Tensor, weights: TailWeights, of_batch: bool, layout: _Layout
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """Return the vectors that make the map's gradient, and the gradients of weight, bias and kernel."""
    kernel, _, weight, bias, moments, _, drop, *_ = weights
    assert moments is not None
    assert kernel is not None
    vectors, constants = (dots, total, pooled, *moments, weight), _vector_constants(weights, layout)
    opened, d_logits, scale, shift = (torch.empty_like(pooled) for _ in range(4))
    shares = pooled.new_empty((prod(layout.by_row), kernel.numel()))
    _kernels().gate_backward[layout.by_row](*vectors, bias, kernel, drop, opened, d_logits, shares, **constants)
    slope = pooled.new_empty(layout.channels) if of_batch else None
    d_weight, d_bias = (torch.empty_like(moments.mean if t is None else t) for t in (weight, bias))
    made, sizes = (scale, shift, slope, d_weight, d_bias), (layout.samples, layout.area)
    constants = {**constants, **_BATCH, "of_batch": of_batch}
    _kernels().norm_backward[layout.by_column](*vectors, kernel, opened, d_logits, *made, *sizes, **constants)
    d_kernel = shares.sum(0).to(kernel.dtype).view_as(kernel)
    return (scale, shift, slope, moments.mean), (d_weight, d_bias, d_kernel)

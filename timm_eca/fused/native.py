"""The compiled passes of a fused tail: `_native.cpp`, built when the package is installed where there is a compiler.

Loaded at first use and called through ctypes, without the interpreter lock. Its threads are PyTorch's: the OpenMP
runtime is the one that PyTorch has loaded. Where there is no such library, the passes of PyTorch do the same.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .formula import Moments, TailWeights, layout_of

__all__ = ["backward", "forward", "loaded", "takes"]

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_POINTER, _INT, _DOUBLE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_ARGS: dict[str, list[Any]] = {
    "forward": [_POINTER] * 7 + [_INT] + [_POINTER] * 3 + [_DOUBLE] + [_POINTER] * 3 + [_DOUBLE, _FLAG, _FLAG],
    "backward": [_POINTER] * 9 + [_INT] + [_POINTER] * 3 + [_DOUBLE] + [_POINTER] * 4 + [_FLAG],
}


@cache
def _library() -> dict[tuple[str, torch.dtype], Any]:
    spec = find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return {}
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # a PyTorch with another OpenMP runtime
        return {}
    functions = {(kind, dtype): library[f"tail_{kind}_{name}"] for kind in _ARGS for dtype, name in _NAMES.items()}
    for (kind, _), function in functions.items():
        function.argtypes, function.restype = _ARGS[kind], None
    return functions


def loaded() -> bool:
    """Whether the compiled passes can be had."""
    return bool(_library())


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled passes take a map, a shortcut and vectors: on the CPU, all float32 or all float64."""
    dtype = tensors[0].dtype  # type: ignore[union-attr]
    if dtype not in _NAMES or not _library():
        return False
    for t in tensors:
        if t is not None and (t.dtype != dtype or not t.is_cpu or (t.dim() < 4 and not t.is_contiguous())):
            return False
    return True


def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor, Moments]:
    """As `passes.forward`."""
    out = z if inplace else torch.empty_like(z)
    pooled = z.new_empty(z.shape[:2])
    moments = weights.moments or Moments(z.new_empty(z.shape[1]), z.new_empty(z.shape[1]))
    running_mean, running_var, factor = weights.running or (None, None, 0.0)
    shortcut = None if shortcut is None else shortcut.contiguous(memory_format=layout_of(z))
    _library()["forward", z.dtype](
        _shape(z),
        *map(_data, (z, shortcut, out, weights.weight, weights.bias, weights.kernel)),
        weights.kernel.numel(),
        *map(_data, (*moments, weights.drop)),
        weights.eps,
        *map(_data, (pooled, running_mean, running_var)),
        factor,
        weights.moments is None,
        relu,
    )
    return out, pooled, moments


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`."""
    assert weights.moments is not None
    masked = grad if out is None else torch.empty_like(z)
    dz = torch.empty_like(z) if wanted[0] else None
    d_weights = [torch.empty_like(t) for t in (*weights.moments, weights.kernel)]
    _library()["backward", z.dtype](
        _shape(z),
        *map(_data, (grad, out, z, masked, dz, weights.weight, weights.bias, weights.kernel)),
        weights.kernel.numel(),
        *map(_data, (*weights.moments, weights.drop)),
        weights.eps,
        *map(_data, (pooled, *d_weights)),
        wanted[5],
    )
    return [gradient if want else None for gradient, want in zip((dz, masked, *d_weights), wanted)]


def _shape(z: Tensor) -> Any:
    batch, channels, height, width = z.shape
    return (ctypes.c_int64 * 5)(batch, channels, height * width, not z.is_contiguous(), torch.get_num_threads())


def _data(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

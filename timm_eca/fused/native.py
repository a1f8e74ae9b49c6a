"""The compiled passes of a fused tail: `_native.cpp`, built when the package is installed where there is a compiler.

Called through ctypes, without the interpreter lock. Its threads are PyTorch's: the OpenMP runtime is the one that
PyTorch has loaded. Where there is no such library, the passes of PyTorch do the same.
"""

import ctypes
from importlib.util import find_spec
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .formula import Moments, TailWeights, layout_of

__all__ = ["backward", "forward", "loaded", "takes"]

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
# A call's arguments travel as one struct: packing it costs a fraction of converting them one by one.
_FORWARD = Struct("8q2d12P")
_BACKWARD = Struct("8q1d15P")


def _load() -> dict[tuple[str, torch.dtype], Any]:
    spec = find_spec(f"{__package__}._native")
    if spec is None or spec.origin is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return {}
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # a PyTorch with another OpenMP runtime
        return {}
    ways = ("forward", "backward")
    functions = {(way, dtype): library[f"tail_{way}_{name}"] for way in ways for dtype, name in _NAMES.items()}
    for function in functions.values():
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return functions


_functions = _load()


def loaded() -> bool:
    """Whether the compiled passes can be had."""
    return bool(_functions)


def takes(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> bool:
    """Whether the compiled passes take a map, a shortcut and vectors: on the CPU, all float32 or all float64."""
    dtype = z.dtype
    if ("forward", dtype) not in _functions or not z.is_cpu:
        return False
    running = weights.running[:2] if weights.running else ()
    vectors = (weights.weight, weights.bias, weights.kernel, weights.drop, *(weights.moments or ()), *running)
    for t in vectors:
        if t is not None and not (t.dtype == dtype and t.is_cpu and t.is_contiguous()):
            return False
    return shortcut is None or (shortcut.dtype == dtype and shortcut.is_cpu)


def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor | None, Moments]:
    """As `passes.forward`. In place, z is not pooled for a backward pass."""
    of_batch = weights.moments is None
    keeps = not inplace
    out = torch.empty_like(z) if keeps else z
    pooled = z.new_empty(z.shape[:2]) if keeps else None
    moments = weights.moments or Moments(z.new_empty(z.shape[1]), z.new_empty(z.shape[1]))
    running_mean, running_var, factor = weights.running or (None, None, 0.0)
    maps = (z, _as_format(shortcut, z), out)
    vectors = (weights.weight, weights.bias, weights.kernel, *moments, weights.drop, pooled, running_mean, running_var)
    sizes = (*_sizes(z), weights.kernel.numel(), of_batch, relu)
    _functions["forward", z.dtype](_FORWARD.pack(*sizes, weights.eps, factor, *map(_address, maps + vectors)))
    return out, pooled, moments


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`."""
    assert weights.moments is not None
    masked = grad if out is None else torch.empty_like(z)
    dz = torch.empty_like(z) if wanted[0] else None
    d_weights = [torch.empty_like(t) for t in (*weights.moments, weights.kernel)]
    maps = (grad, out, z, masked, dz)
    vectors = (weights.weight, weights.bias, weights.kernel, *weights.moments, weights.drop, pooled, *d_weights)
    sizes = (*_sizes(z), weights.kernel.numel(), wanted[5], False)
    _functions["backward", z.dtype](_BACKWARD.pack(*sizes, weights.eps, *map(_address, maps + vectors)))
    return [gradient if want else None for gradient, want in zip((dz, masked, *d_weights), wanted)]


def _sizes(z: Tensor) -> tuple[int, ...]:
    batch, channels, height, width = z.shape
    return batch, channels, height * width, not z.is_contiguous(), torch.get_num_threads()


def _as_format(shortcut: Tensor | None, z: Tensor) -> Tensor | None:
    return None if shortcut is None else shortcut.contiguous(memory_format=layout_of(z))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

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

from .formula import Moments, TailWeights

__all__ = ["backward", "forward", "loaded", "takes"]

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
# A call's arguments travel as one struct: packing it costs a fraction of converting them one by one.
_FORWARD = Struct("8q3d16P")
_BACKWARD = Struct("8q1d15P")
_NO_NORM = (None, None, None, None, 0.0)


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
    kernel, _, weight, bias, moments, running, drop, _, shortcut_norm = weights
    mean, var = moments or (running[:2] if running else (None, None))
    for t in (kernel, weight, bias, mean, var, drop, *(shortcut_norm or _NO_NORM)[:4]):
        if t is not None and not (t.dtype == dtype and t.is_cpu and t.is_contiguous()):
            return False
    return shortcut is None or (shortcut.dtype == dtype and shortcut.is_cpu and shortcut.shape == z.shape)


def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor | None, Moments]:
    """As `passes.forward`. In place, z is not pooled for a backward pass."""
    kernel, _, weight, bias, given, running, drop, eps, shortcut_norm = weights
    out, pooled = (z, None) if inplace else (torch.empty_like(z), z.new_empty(z.shape[:2]))
    moments = given or Moments(z.new_empty(z.shape[1]), z.new_empty(z.shape[1]))
    *kept, factor = running or (None, None, 0.0)
    *of_shortcut, shortcut_eps = shortcut_norm or _NO_NORM
    nhwc = not z.is_contiguous()
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    tensors = (z, shortcut, out, weight, bias, kernel, *moments, drop, pooled, *kept, *of_shortcut)
    sizes = (*_sizes(z, nhwc), kernel.numel(), given is None, relu)
    _functions["forward", z.dtype](_FORWARD.pack(*sizes, eps, factor, shortcut_eps, *map(_address, tensors)))
    return out, pooled, moments


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`."""
    kernel, _, weight, bias, moments, _, drop, eps, _ = weights
    assert moments is not None
    masked = grad if out is None else torch.empty_like(z)
    dz = torch.empty_like(z) if wanted[0] else None
    d_weights = [torch.empty_like(t) for t in (*moments, kernel)]
    tensors = (grad, out, z, masked, dz, weight, bias, kernel, *moments, drop, pooled, *d_weights)
    sizes = (*_sizes(z, not z.is_contiguous()), kernel.numel(), wanted[5], False)
    _functions["backward", z.dtype](_BACKWARD.pack(*sizes, eps, *map(_address, tensors)))
    return [gradient if want else None for gradient, want in zip((dz, masked, *d_weights), wanted)]


def _sizes(z: Tensor, nhwc: bool) -> tuple[int, ...]:
    batch, channels, height, width = z.shape
    return batch, channels, height * width, nhwc, torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

"""The compiled passes of a fused tail: `_native.cpp`, built when the package is installed where there is a compiler.

Called through ctypes, without the interpreter lock. Its threads are PyTorch's: the OpenMP runtime is the one that
PyTorch has loaded. Where there is no such library, the passes of PyTorch do the same.
"""

import ctypes
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from .formula import Moments, TailWeights, layout_of
from .known import CLASSES, Tensors

__all__ = ["backward", "forward", "gains", "gains_backward", "inference", "loaded", "takes"]

_NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
# What the passes compute with, by the type of a map, and what it may come in.
_VECTORS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
_GIVEN = {dtype: (of_vectors, dtype) for dtype, of_vectors in _VECTORS.items()}
# A call's arguments travel as one struct: packing it costs a fraction of converting them one by one.
_FORWARD = Struct("8q3d20P")
_BACKWARD = Struct("8q1d21P")
# What finds a tensor's elements by the tensor itself, of these classes without Python's lock. Each of a call's twenty
# would else be asked for its address in Python.
_DATA_OF = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", 0)
_FINDER = (_DATA_OF, id(None))
_FOUND = frozenset((*CLASSES, type(None)))
_NO_MAPS, _NO_VECTORS = (None,) * 5, (None,) * 4
_NOTHING, _POOL, _MOMENTS = range(3)  # what is read of a map before the result is made
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
    """Whether the compiled passes take a map, a shortcut and vectors: on the CPU, of one type.

    That is float32, float64, or bfloat16, of which the vectors may be float32.
    """
    dtype = z.dtype
    if ("forward", dtype) not in _functions or not z.is_cpu:
        return False
    given = _GIVEN[dtype]
    kernel, _, weight, bias, moments, running, drop, _, shortcut_norm, pooled = weights
    mean, var = moments or (running[:2] if running else (None, None))
    for t in (kernel, weight, bias, mean, var, drop, pooled, *(shortcut_norm or _NO_NORM)[:4]):
        if t is not None and not (type(t) in CLASSES and t.dtype in given and t.is_cpu and t.is_contiguous()):
            return False
    if shortcut is None:
        return True
    return type(shortcut) is Tensor and shortcut.dtype == dtype and shortcut.is_cpu and shortcut.shape == z.shape


def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor | None, Moments]:
    """As `passes.forward`. In place, z is not pooled for a backward pass."""
    out, pooled = z, weights.pooled
    if not inplace:
        out, pooled = torch.empty_like(z), _vector(z, z.shape[:2]) if pooled is None else pooled
    if shortcut is not None and shortcut.stride() != z.stride():
        shortcut = shortcut.contiguous(memory_format=layout_of(z))
    return out, pooled, _forward(z, shortcut, out, weights, relu, pooled)


def inference(tensors: Tensors, relu: bool) -> Callable[[Tensors, float], None] | None:
    """Return a short way to the tail of tensors like these, in place, by given moments; None where there is none.

    Args:
        tensors: z, the shortcut, the norm's weight and bias, ECA's kernel, the moments, and z's mean where it is known.
        relu: Whether a ReLU ends the tail.

    Returns:
        A function of such tensors and the norm's epsilon.
    """
    z, shortcut, _, _, kernel, *_, pooled = tensors
    assert z is not None
    assert kernel is not None
    if not _DATA_OF or (shortcut is not None and shortcut.stride() != z.stride()):
        return None
    if any(t is not None and t.dtype != _VECTORS[z.dtype] for t in tensors[2:]):
        return None
    *shape, _ = _sizes(z, not z.is_contiguous())
    rest = kernel.numel(), _NOTHING if pooled is not None else _POOL, relu
    function, pack, nothing = _functions["forward", z.dtype], _FORWARD.pack, id(None)

    def infer(tensors: Tensors, eps: float) -> None:
        z, shortcut, weight, bias, kernel, mean, var, pooled = map(id, tensors)
        maps, vectors = (z, shortcut, z), (weight, bias, kernel, mean, var, nothing, pooled)
        sizes = (*shape, torch.get_num_threads(), *rest)
        function(pack(*sizes, eps, 0.0, 0.0, *_FINDER, *maps, *vectors, *[nothing] * 8))

    return infer


def gains(z: Tensor, weights: TailWeights) -> tuple[Tensor, Moments, Tensor, Tensor]:
    """As `formula.gains_of_map`."""
    pooled, scale, offset = (_vector(z, z.shape[:2]) for _ in range(3))
    return pooled, _forward(z, None, None, weights, False, pooled, (scale, offset)), scale, offset


def _forward(
    z: Tensor,
    shortcut: Tensor | None,
    out: Tensor | None,
    weights: TailWeights,
    relu: bool,
    pooled: Tensor | None,
    gains: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Moments:
    """Return the moments. The map is made, out, or, where that is None, the vectors that would make it."""
    wide = _widened(weights, z.dtype)
    kernel, _, weight, bias, given, running, drop, eps, shortcut_norm, known = wide
    moments = given or Moments(_vector(z, z.shape[1]), _vector(z, z.shape[1]))
    reading = _MOMENTS if given is None else _POOL if known is None else _NOTHING
    *kept, factor = running or (None, None, 0.0)
    *of_shortcut, shortcut_eps = shortcut_norm or _NO_NORM
    tensors = (z, shortcut, out, weight, bias, kernel, *moments, drop, pooled, *kept, *of_shortcut, *gains)
    sizes = (*_sizes(z, not z.is_contiguous()), kernel.numel(), reading, relu)
    _functions["forward", z.dtype](_FORWARD.pack(*sizes, eps, factor, shortcut_eps, *_pointers(tensors)))
    if wide is not weights and weights.running and running:
        for statistic, updated in zip(weights.running[:2], running[:2]):
            if updated is not statistic:
                statistic.copy_(updated)
    return moments


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`."""
    masked = grad if out is None else torch.empty_like(z)
    dz = torch.empty_like(z) if wanted[0] else None
    maps = (grad, out, z, masked, dz)
    d_weights = _backward(_sizes(z, not z.is_contiguous()), maps, pooled, _widened(weights, z.dtype), wanted[5])
    if z.dtype != pooled.dtype:
        of = (weights.weight, weights.bias, weights.kernel)
        d_weights = [d if t is None else d.to(t.dtype) for d, t in zip(d_weights, of)]
    return [gradient if want else None for gradient, want in zip((dz, masked, *d_weights), wanted)]


def gains_backward(
    dots: Tensor, total: Tensor, pooled: Tensor, weights: TailWeights, area: int, of_batch: bool
) -> tuple[Tensor, ...]:
    """Return the gradients that `formula.gains_of_map` has besides that of its scale by the map itself.

    Args:
        dots: Gradient of the scale (B, C).
        total: Gradient of the offset (B, C).
        pooled: The map's mean (B, C).
        weights: What the tail computed with; the moments are those it was normed by.
        area: Pixels of the map.
        of_batch: Whether the moments were those of the batch.

    Returns:
        shift (B, C) and slope (C), where the map's gradient is shift + slope * (z - mean), and those of weight, bias
        and kernel.
    """
    shift, slope = total.clone(), total.new_empty(total.shape[1])
    vectors = [dots.clone(), shift, torch.empty_like(total), slope]
    sizes = (*pooled.shape, area, False, torch.get_num_threads())
    return shift, slope, *_backward(sizes, _NO_MAPS, pooled, weights, of_batch, vectors)


def _backward(
    sizes: tuple[int, ...],
    maps: tuple[Tensor | None, ...],
    pooled: Tensor,
    weights: TailWeights,
    of_batch: bool,
    vectors: list[Tensor] | None = None,
) -> list[Tensor]:
    """Return the gradients of weight, bias and kernel. The map's is made, or, without maps, the vectors that would."""
    kernel, _, weight, bias, moments, _, drop, eps, *_ = weights
    assert moments is not None
    d_weights = [torch.empty_like(t) for t in (*moments, kernel)]
    tensors = (*maps, weight, bias, kernel, *moments, drop, pooled, *d_weights, *(vectors or _NO_VECTORS))
    sizes = (*sizes, kernel.numel(), of_batch, False)
    dtype = kernel.dtype if maps[0] is None else maps[0].dtype
    _functions["backward", dtype](_BACKWARD.pack(*sizes, eps, *_pointers(tensors)))
    return d_weights


def _widened(weights: TailWeights, dtype: torch.dtype) -> TailWeights:
    """Return what a tail computes with in the type that the passes compute in; for half precision anew."""
    return weights if _VECTORS[dtype] == dtype else _wide(weights)


def _wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_wide, value))
    return value.float() if isinstance(value, Tensor) else value


def _vector(z: Tensor, shape: Any) -> Tensor:
    return z.new_empty(shape, dtype=_VECTORS[z.dtype])


def _sizes(z: Tensor, nhwc: bool) -> tuple[int, ...]:
    batch, channels, height, width = z.shape
    return batch, channels, height * width, nhwc, torch.get_num_threads()


def _pointers(tensors: tuple[Tensor | None, ...]) -> Iterable[int]:
    """Return what the passes find tensors by, and how; they have to be held until the passes are done."""
    if _DATA_OF and _FOUND.issuperset(map(type, tensors)):
        return chain(_FINDER, map(id, tensors))
    return chain((0, 0), map(_address, tensors))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

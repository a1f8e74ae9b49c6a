"""The compiled passes of a fused tail: `_native.cpp`, built when the package is installed where there is a compiler.

It is built twice, for AVX2 and for AVX-512, and the one is loaded that fits what PyTorch itself uses here.

They are operators of PyTorch, `torch.ops.timm_eca`, registered through its stable C interface: a call of one takes a
fraction of what Python would need to prepare it, which between two convolutions, with cold caches, is longer than a
small tail takes. They run without the interpreter lock, with PyTorch's threads: the OpenMP runtime is the one that
PyTorch has loaded. Where there is no such library, the passes of PyTorch do the same.
"""

import ctypes
from collections.abc import Iterable
from importlib.util import find_spec
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from .formula import Act, Moments, Norm, Running, TailWeights, normed_shortcut

__all__ = [
    "are_plain",
    "backward",
    "defined_now",
    "forward",
    "gradients_of",
    "infer",
    "loaded",
    "norm_pool",
    "takes",
    "takes_conv",
    "train",
]

_CLASSES = frozenset({Tensor, nn.Parameter, type(None)})  # any other may have operations of its own
# What the passes compute with, by the type of a map; vectors may come in either.
_VECTORS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
_NONE = (None, None)
_NO_NORM = (None, None, None, None, 0.0)
_NO_RUNNING = (None, None, 0.0, None)

_OF_ALL = "Tensor? weight, Tensor? bias, Tensor? kernel, Tensor? mean, Tensor? var, Tensor? drop"
_OF_INFERENCE = (
    f"(Tensor(a!) z, Tensor? shortcut, {_OF_ALL}, Tensor? pooled, Tensor? shortcut_weight, Tensor? shortcut_bias,"
    " Tensor? shortcut_mean, Tensor? shortcut_var, float eps, float shortcut_eps, int act)"
)
_OF_NORM = (
    "(Tensor(a!) z, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, int act, Tensor conv_weight,"
    " Tensor? conv_bias)"
)
_SCHEMAS = {
    # In place, by given moments. False where the passes do not take such tensors; in a graph that is an error.
    "infer_": f"{_OF_INFERENCE} -> bool",
    "graph_infer_": f"{_OF_INFERENCE} -> ()",
    # A norm and its activation in place of z. Returns the mean of what the convolution after it makes, or nothing where
    # the passes do not take such tensors; in a graph that is an error.
    "norm_pool_": f"{_OF_NORM} -> Tensor",
    "graph_norm_pool_": f"{_OF_NORM} -> Tensor",
    # Without moments, by the batch's, which the running ones are updated by; a factor of nan is 1 / seen. Returns
    # whether such tensors are taken, the result but in place, z pooled if there is a gate, and the batch's moments; the
    # others are None.
    "tail": f"(Tensor(a!) z, Tensor? shortcut, {_OF_ALL}, Tensor(b!)? running_mean, Tensor(c!)? running_var,"
    " Tensor(d!)? seen, float factor, float eps, int act, bool inplace) -> (bool, Tensor, Tensor, Tensor, Tensor)",
    # Returns the gradients of z, shortcut, weight, bias and kernel. None: of z where it is not asked for, of a kernel
    # that is not there, and of the shortcut where there is no kernel, or no out, and so it is grad.
    "tail_backward": f"(Tensor grad, Tensor? out, Tensor z, Tensor? pooled, {_OF_ALL}, float eps, int act,"
    " bool of_batch, bool for_z) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # What operators.py has for graphs.
    "gains": f"(Tensor z, {_OF_ALL}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gains_backward": f"(Tensor dots, Tensor total, Tensor pooled, {_OF_ALL}, float eps, SymInt area, bool of_batch)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
_INPLACE = ("infer_", "graph_infer_", "norm_pool_", "graph_norm_pool_")
# The libraries that a processor takes, by the capability that PyTorch finds in it, best first.
_LIBRARIES = {"AVX512": ("_native_avx512", "_native"), "AVX2": ("_native",)}
_INTERFACE = 4  # as in _native.cpp; grows with each change of a schema
# PyTorch's functions that the operators call, in the order in which `_torch.h` has them.
_API = (
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_copy_",
    "aoti_torch_new_tensor_handle",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_new_uninitialized_tensor",
    "torch_delete_stable_ivalue",
)


def _define() -> None:
    for name, schema in _SCHEMAS.items():  # the maps come in whatever layout a compiler has chosen for them
        torch.library.define(f"timm_eca::{name}", schema, tags=(torch.Tag.flexible_layout,))
    for name in (*_INPLACE, "tail", "tail_backward"):  # a gradient of them is what tail.py is for
        torch.library.impl(f"timm_eca::{name}", "Autograd", torch.library.fallthrough_kernel)


def _load() -> bool:
    """Have PyTorch call a library for tensors on the CPU, and return whether it does."""
    return any(map(_register, _LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ())))


def _register(name: str) -> bool:
    spec = find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None:
        return False
    try:
        library, pytorch = ctypes.CDLL(spec.origin), ctypes.CDLL(torch._C.__file__)
    except OSError:  # a PyTorch with another OpenMP runtime
        return False
    found = [ctypes.cast(pytorch[name], ctypes.c_void_p).value if hasattr(pytorch, name) else None for name in _API]
    built_for = library.timm_eca_interface() if hasattr(library, "timm_eca_interface") else 1
    if not all(found[:-1]) or built_for != _INTERFACE:  # an older PyTorch, or a library that was built before
        return False
    library.timm_eca_register.restype = ctypes.c_bool
    return library.timm_eca_register((ctypes.c_void_p * len(found))(*found))


defined_now = not hasattr(torch.ops.timm_eca, "tail")  # PyTorch keeps them where the package is imported anew
if defined_now:
    _define()
    _loaded = _load()
else:
    _loaded = torch._C._dispatch_has_kernel_for_dispatch_key("timm_eca::tail", "CPU")
# What is called: without the looks that operators in Python's hands need.
_operators = torch.ops.timm_eca
_infer, _norm_pool = _operators.infer_.default._op, _operators.norm_pool_.default._op
_tail = _operators.tail.default._op
_tail_backward = _operators.tail_backward.default._op


def loaded() -> bool:
    """Whether the compiled passes can be had."""
    return _loaded


def takes(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> bool:
    """Whether `forward` takes a map, a shortcut and vectors. Graphs are told before there are any."""
    dtype = z.dtype
    if not (_loaded and dtype in _VECTORS and z.is_cpu):
        return False
    given = (_VECTORS[dtype], dtype)
    kernel, _, weight, bias, moments, running, drop, _, shortcut_norm, pooled = weights
    vectors = (kernel, weight, bias, *(moments or ()), *(running or ())[:2], drop, pooled, *(shortcut_norm or ())[:4])
    if not all(t is None or (t.dtype in given and t.is_cpu) for t in vectors) or not are_plain((shortcut, *vectors)):
        return False
    return shortcut is None or (shortcut.dtype == dtype and shortcut.is_cpu and shortcut.shape == z.shape)


def takes_conv(z: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> bool:
    """Whether `norm_pool` takes a map, a convolution's weights, and a norm. Graphs are told before there are any."""
    tensors = (weight, bias, *norm[:4])
    return (
        _loaded
        and z.is_cpu
        and all(t is None or (t.dtype == z.dtype and t.is_cpu) for t in tensors)
        and are_plain(tensors)
    )


def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor | None, Moments] | None:
    """As `passes.forward`, or None where the passes do not take such tensors.

    In place, z is not pooled for a backward pass.
    """
    kernel, _, weight, bias, moments, running, drop, eps, shortcut_norm, pooled = weights
    vectors = weight, bias, kernel, *(moments or _NONE), drop
    if moments is not None and (inplace or pooled is not None or shortcut_norm is not None):
        out = z if inplace else z.clone()
        return (out, pooled, moments) if infer(out, shortcut, vectors, pooled, shortcut_norm, eps, relu) else None
    added = None if shortcut is None else normed_shortcut(shortcut, weights)
    made = train(z, added, vectors, running, eps, relu, inplace)
    if made is None:
        return None
    return z if inplace else made[0], None if inplace else made[1], moments or Moments(*made[2:])


def infer(
    z: Tensor,
    shortcut: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    pooled: Tensor | None,
    shortcut_norm: Norm | None,
    eps: float,
    act: int,
) -> bool:
    """Put a tail by given moments in the place of z, if the passes take such tensors, and return whether they do.

    They take maps of float32, float64 or bfloat16 on the CPU, with vectors of that type or, of bfloat16, of float32.

    Args:
        z: Map before the norm.
        shortcut: What is added, or None.
        vectors: Weight, bias, ECA's kernel, mean, variance, and the drop path's factors. Without a kernel there is no
            attention.
        pooled: z's mean over the map, None where it is not known yet.
        shortcut_norm: The norm that the shortcut has yet to go through.
        eps: The norm's epsilon.
        act: The `Act` that ends the tail.
    """
    if not (_loaded and z.is_cpu and are_plain((z, shortcut, *vectors))):
        return False
    weight, bias, mean, var, shortcut_eps = shortcut_norm or _NO_NORM
    try:
        return _infer(z, shortcut, *vectors, pooled, weight, bias, mean, var, eps, shortcut_eps, act)
    except NotImplementedError:  # tensors of several devices, of which others have a better word to say
        return False


def norm_pool(
    z: Tensor, vectors: tuple[Tensor | None, ...], eps: float, act: int, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Put a norm by given moments and its activation in the place of z, and return what is known then of the next map.

    That is the mean (B, C) of what a convolution makes, of a size of 1 or 3, that keeps the map's sizes. None where the
    passes do not take such tensors: they take maps of float32 or float64 on the CPU, and a convolution of that type.

    Args:
        z: Map before the norm (B, D, H, W).
        vectors: The norm's weight, bias, mean and variance.
        eps: The norm's epsilon.
        act: The `Act` after it.
        weight: The convolution's weight (C, D, 1, 1) or (C, D, 3, 3).
        bias: Its bias (C,), or None.
    """
    if not (_loaded and z.is_cpu and are_plain((z, *vectors, weight, bias))):
        return None
    try:
        pooled = _norm_pool(z, *vectors, eps, act, weight, bias)
    except NotImplementedError:
        return None
    return pooled if len(pooled) else None


def train(
    z: Tensor,
    shortcut: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    running: Running | None,
    eps: float,
    act: int,
    inplace: bool,
) -> list[Any] | None:
    """Return the result, z pooled, and the batch's moments, or None as `infer` does. Arguments are as `infer`'s.

    Without moments among the vectors it is the batch's that are used, and that the running ones are updated by; with
    them None is returned in their place. So it is of the pooled z without a kernel, and in place of the result, which
    then is where z was.
    """
    mean, var, factor, seen = running or _NO_RUNNING
    if not (_loaded and z.is_cpu and are_plain((z, shortcut, mean, var, *vectors))):
        return None
    factor = nan if factor is None else factor
    try:
        taken, *made = _tail(z, shortcut, *vectors, mean, var, seen, factor, eps, act, inplace)
    except NotImplementedError:
        return None
    return made if taken else None


def backward(
    grad: Tensor, out: Tensor | None, z: Tensor, pooled: Tensor, weights: TailWeights, wanted: list[bool]
) -> list[Tensor | None]:
    """As `passes.backward`, of a tail that `forward` took."""
    kernel, _, weight, bias, moments, _, drop, eps, *_ = weights
    assert moments is not None
    saved = (out, z, pooled, weight, bias, kernel, *moments, drop)
    gradients = gradients_of(grad, saved, eps, Act.NONE if out is None else Act.RELU, wanted[5], wanted[0])
    return [gradient if want else None for gradient, want in zip(gradients, wanted)]


def gradients_of(
    grad: Tensor, saved: tuple[Tensor | None, ...], eps: float, act: int, of_batch: bool, for_z: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of z, shortcut, weight, bias and kernel, None for what is not asked for or not there.

    Args:
        grad: Gradient of the output.
        saved: The output where an activation made it, z, z pooled, weight, bias, kernel, the moments, and drop.
        eps: The norm's epsilon.
        act: The `Act` that ended the tail.
        of_batch: Whether the moments were those of the batch.
        for_z: Whether the gradient of z is wanted.
    """
    gradients = _tail_backward(grad, *saved, eps, act, of_batch, for_z)
    return gradients if saved[0] is not None else (gradients[0], grad, *gradients[2:])


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    return _CLASSES.issuperset(map(type, tensors))

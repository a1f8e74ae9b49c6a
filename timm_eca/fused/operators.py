"""The compiled passes as PyTorch operators, for `torch.compile`: a graph calls them where it has no such loops itself.

`torch.ops.timm_eca.tail`, `tail_` and `tail_backward` take and give tensors alone. An empty tensor stands for what is
not asked for, because an operator cannot return None, nor what it was given.
"""

from typing import Any

import torch
from torch import Tensor

from . import native
from .formula import Moments, Norm, TailWeights, layout_of, update_running

__all__ = ["operator_tail"]

_VECTORS = "Tensor? weight, Tensor? bias, Tensor kernel"
_REST = f"Tensor? shortcut, {_VECTORS}, Tensor? mean, Tensor? var, Tensor? drop, float eps, bool relu"
_OPERATORS = {
    "tail": f"(Tensor z, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    "tail_": f"(Tensor(a!) z, {_REST}, Tensor?[] shortcut_norm, float shortcut_eps) -> (Tensor, Tensor)",
    "tail_backward": f"(Tensor grad, Tensor? out, Tensor z, Tensor pooled, {_VECTORS}, Tensor mean, Tensor var,"
    " Tensor? drop, float eps, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def operator_tail(z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool) -> Tensor:
    """Compute `tail_formula` where `native.takes` its tensors. Where no gradient is asked for, z is overwritten.

    The running statistics are the graph's to update.
    """
    vectors = (weights.weight, weights.bias, weights.kernel)
    rest = (shortcut, *vectors, *(weights.moments or (None, None)), weights.drop, weights.eps, relu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, shortcut, *vectors)):
        out, _, *moments = torch.ops.timm_eca.tail(z, *rest)
    else:
        *shortcut_norm, shortcut_eps = weights.shortcut_norm or (0.0,)
        out, moments = z, torch.ops.timm_eca.tail_(z, *rest, shortcut_norm, shortcut_eps)
    if weights.moments is None:
        update_running(weights.running, Moments(*moments), z)
    return out


def _fake_tail(z, shortcut, weight, bias, kernel, mean, var, drop, eps, relu):
    return torch.empty_like(z), z.new_empty(z.shape[:2]), *_fake_moments(z, mean)


def _fake_tail_(z, shortcut, weight, bias, kernel, mean, var, drop, eps, relu, shortcut_norm, shortcut_eps):
    return _fake_moments(z, mean)


def _fake_moments(z: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    size = z.shape[1] if given is None else 0
    return z.new_empty(size), z.new_empty(size)


def _tail(z, shortcut, weight, bias, kernel, mean, var, drop, eps, relu):
    weights = _weights(weight, bias, kernel, mean, var, drop, eps)
    dense = _dense(z)
    out, pooled, moments = native.forward(dense, shortcut, weights, relu, inplace=False)
    return _as_graph_has_it(out, z, dense), pooled, *_own(moments, weights, z)


def _tail_(z, shortcut, weight, bias, kernel, mean, var, drop, eps, relu, shortcut_norm, shortcut_eps):
    weights = _weights(weight, bias, kernel, mean, var, drop, eps)
    if shortcut_norm:
        weights = weights._replace(shortcut_norm=Norm(*shortcut_norm, shortcut_eps))
    dense = _dense(z)
    _, _, moments = native.forward(dense, shortcut, weights, relu, inplace=True)
    if dense is not z:
        z.copy_(dense)
    return _own(moments, weights, z)


def _own(moments: Moments, weights: TailWeights, z: Tensor) -> tuple[Tensor, Tensor]:
    return moments if weights.moments is None else (z.new_empty(0), z.new_empty(0))


def _fake_backward(grad, out, z, pooled, weight, bias, kernel, mean, var, drop, eps, wanted):
    like = [z, z if out is not None else None, weight, bias, kernel]
    return tuple(_or_empty(torch.empty_like(t) if t is not None and want else None, z) for t, want in zip(like, wanted))


def _backward(grad, out, z, pooled, weight, bias, kernel, mean, var, drop, eps, wanted):
    weights = _weights(weight, bias, kernel, mean, var, drop, eps)
    dense = _dense(z)
    layout = layout_of(dense)
    grad = grad.contiguous(memory_format=layout)
    masked_by = None if out is None else out.contiguous(memory_format=layout)
    dz, d_shortcut, *rest = native.backward(grad, masked_by, dense, pooled, weights, wanted)
    given = (dz, None if out is None else d_shortcut)
    maps = [None if t is None else _as_graph_has_it(t, z, dense) for t in given]
    rest = [d if t is not None else None for d, t in zip(rest, (weight, bias, kernel))]
    return tuple(_or_empty(t, z) for t in (*maps, *rest))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    z, _, weight, bias, kernel, mean, var, drop, ctx.eps, relu = inputs
    out, pooled, *moments = output
    ctx.of_batch = mean is None
    mean, var = moments if ctx.of_batch else (mean, var)
    ctx.mark_non_differentiable(pooled, *moments)
    ctx.save_for_backward(out if relu else None, z, pooled, weight, bias, kernel, mean, var, drop)


def _grads(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    relu = ctx.saved_tensors[0] is not None
    grads = torch.ops.timm_eca.tail_backward(grad, *ctx.saved_tensors, ctx.eps, [*wanted, ctx.of_batch])
    dz, d_shortcut, *rest = (d if want else None for d, want in zip(grads, wanted))
    if wanted[1] and not relu:
        d_shortcut = grad
    return dz, d_shortcut, *rest, None, None, None, None, None


def _no_grads(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("timm_eca::tail_backward has no derivative: take second derivatives of a model not compiled.")


def _weights(weight, bias, kernel, mean, var, drop, eps) -> TailWeights:
    moments = None if mean is None else Moments(mean, var)
    return TailWeights(kernel, torch.sigmoid, weight, bias, moments, None, drop, eps)


def _dense(z: Tensor) -> Tensor:
    """Return a map in one of the two layouts that the passes read: a graph may have cut it out of another."""
    dense = z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)
    return z if dense else z.contiguous()


def _as_graph_has_it(result: Tensor, z: Tensor, dense: Tensor) -> Tensor:
    """Return a map in the strides that the graph expects of it: those of one made like z."""
    return result if dense is z else torch.empty_like(z).copy_(result)


def _or_empty(tensor: Tensor | None, z: Tensor) -> Tensor:
    return z.new_empty(0) if tensor is None else tensor


def _register() -> None:
    on_cpu: dict[str, Any] = {"tail": _tail, "tail_": _tail_, "tail_backward": _backward}
    fake: dict[str, Any] = {"tail": _fake_tail, "tail_": _fake_tail_, "tail_backward": _fake_backward}
    for name, schema in _OPERATORS.items():  # the maps come in whatever layout the compiler has chosen for them
        torch.library.define(f"timm_eca::{name}", schema, tags=(torch.Tag.flexible_layout,))
        torch.library.impl(f"timm_eca::{name}", "CPU", on_cpu[name])
        torch.library.register_fake(f"timm_eca::{name}", fake[name])
    torch.library.register_autograd("timm_eca::tail", _grads, setup_context=_setup_context)
    torch.library.register_autograd("timm_eca::tail_backward", _no_grads)


if not hasattr(torch.ops.timm_eca, "tail_backward"):  # PyTorch keeps them where the package is imported anew
    _register()

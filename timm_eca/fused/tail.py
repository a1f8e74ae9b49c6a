"""The tail of a residual block as one autograd function that keeps no map but its input."""

from typing import Any

import torch
from torch import Tensor

from . import gpu, native, passes
from .formula import Moments, TailWeights, gains_of_map, layout_of, tail_formula
from .operators import operator_gains

__all__ = ["engine_of", "fused_tail", "graph_tail"]

_SMALL = 1 << 18  # elements of a map that a compiled model trains on, of which a call takes longer than it saves


def fused_tail(z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, engine: Any = None) -> Tensor:
    """Compute `tail_formula`, by the engine that takes it. Where no gradient is asked for, z is overwritten.

    A block keeps z, the output where a ReLU ends it (the next block keeps it too), and one vector of each sample.
    """
    engine = engine or engine_of(z, shortcut, weights)
    if torch.is_grad_enabled():
        tensors = (z, shortcut, weights.weight, weights.bias, weights.kernel)
        for t in tensors:
            if t is not None and t.requires_grad:
                return _FusedTail.apply(*tensors, weights, relu, engine)
    return engine.forward(z, shortcut, weights, relu, inplace=True)[0]


def graph_tail(z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool) -> Tensor:
    """Compute `tail_formula` in what `torch.compile` takes into one graph."""
    gains_of = operator_gains if _by_operators(z, shortcut, weights) else gains_of_map
    return tail_formula(z, shortcut, weights, relu, gains_of)


def _by_operators(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> bool:
    """Whether operators find the vectors. In inference, and of small maps, compilers are as fast without a call."""
    if not torch.is_grad_enabled() or z.numel() < _SMALL or weights.gate is not torch.sigmoid:
        return False
    return z.dtype in (torch.float32, torch.float64) and native.takes(z, shortcut, weights)


def engine_of(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> Any:
    """Return the passes that take a tail's tensors."""
    if weights.gate is torch.sigmoid:
        for engine in (native, gpu):
            if engine.takes(z, shortcut, weights):
                return engine
    return passes


class _FusedTail(torch.autograd.Function):
    """The autograd shell around the passes."""

    @staticmethod
    def forward(ctx: Any, z, shortcut, weight, bias, kernel, weights, relu, engine):
        out, pooled, moments = engine.forward(z, shortcut, weights, relu, inplace=False)
        ctx.rest = engine, weights.gate, weights.eps, weights.moments is None
        ctx.save_for_backward(z, out if relu else None, pooled, *moments, weight, bias, kernel, weights.drop)
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        z, out, pooled, mean, var, weight, bias, kernel, drop = ctx.saved_tensors
        engine, gate, eps, of_batch = ctx.rest
        weights = TailWeights(kernel, gate, weight, bias, Moments(mean, var), None, drop, eps)
        if torch.is_grad_enabled():
            grads = _differentiable(grad, out, z, weights, ctx.needs_input_grad, of_batch)
        else:
            wanted = [*ctx.needs_input_grad[:5], of_batch]
            by = engine if torch._C._has_storage(grad) else passes  # a batch of gradients has no address
            grads = by.backward(_as_format(grad, z), out, z, pooled, weights, wanted)
        return *grads, None, None, None


def _differentiable(grad: Tensor, out: Tensor | None, z: Tensor, weights: TailWeights, wanted: Any, of_batch: bool):
    """Return the gradients by differentiating the formula, so that they can be differentiated again."""
    grad = grad if out is None else grad * (out > 0)
    result = tail_formula(z, None, weights._replace(moments=None) if of_batch else weights, relu=False)
    inputs = (z, weights.weight, weights.bias, weights.kernel)
    asked = [t if want else None for t, want in zip(inputs, (wanted[0], *wanted[2:5]))]
    dz, *d_weights = passes.grads_of((result,), (grad,), asked, create_graph=True)
    return [dz, grad if wanted[1] else None, *d_weights]


def _as_format(grad: Tensor, z: Tensor) -> Tensor:
    """Return a gradient in the type and memory format of a map: pooling hands back expanded ones."""
    if grad.stride() == z.stride() and grad.dtype == z.dtype:
        return grad
    return grad.to(z.dtype).contiguous(memory_format=layout_of(z))

"""The tail of a residual block as one autograd function that keeps no map but its input."""

from typing import Any

import torch
from torch import Tensor

from . import gpu, native, passes
from .formula import Moments, Norm, Running, TailWeights, gains_of_map, layout_of, tail_formula
from .operators import operator_gains, operator_infer

__all__ = ["fused_tail", "graph_norm", "graph_tail", "is_known", "trained_tail", "worth_a_call"]

Leaves = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Elements of a map, of which a call from a compiled model takes longer than it saves: in training, and in inference.
_SMALL, _SMALL_INFERENCE = 1 << 18, 1 << 16


def fused_tail(z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool) -> Tensor:
    """Compute `tail_formula`, by the passes that take it. Where no gradient is asked for, z may be overwritten.

    A block keeps z, the output where a ReLU ends it (the next block keeps it too), and one vector of each sample.
    """
    leaves = (z, shortcut, weights.weight, weights.bias, weights.kernel)
    recorded = _is_recorded(leaves)
    engine: Any = native
    by_sigmoid = weights.gate is torch.sigmoid
    found = native.forward(z, shortcut, weights, relu, not recorded) if by_sigmoid else None
    if found is None:
        engine = gpu if by_sigmoid and gpu.takes(z, shortcut, weights) else passes
        found = engine.forward(z, shortcut, weights, relu, not recorded)
    out, pooled, moments = found
    if not recorded:
        return out
    rest = engine, weights.gate, weights.eps, relu, weights.moments is None
    return _record(*leaves, (out, pooled, *moments, weights.drop, rest))


def trained_tail(
    leaves: Leaves, moments: tuple[Tensor | None, Tensor | None], running: Running | None, eps: float, act: int
) -> Tensor | None:
    """As `fused_tail`, by the compiled passes for CPUs where they take it, else None.

    Args:
        leaves: z, the shortcut, the norm's weight and bias, and ECA's kernel, None where there is no attention.
        moments: Mean and variance, both None where they are those of the batch.
        running: Statistics that the batch's update.
        eps: The norm's epsilon.
        act: The `Act` that ends the tail.
    """
    z, shortcut, *weights = leaves
    recorded = _is_recorded(leaves)
    made = native.train(z, shortcut, (*weights, *moments, None), running, eps, act, not recorded)
    if made is None or not recorded:
        return None if made is None else z
    out, pooled, *of_batch = made
    rest = native, torch.sigmoid, eps, act, moments[0] is None
    return _record(*leaves, (out, pooled, *(of_batch if moments[0] is None else moments), None, rest))


def _is_recorded(leaves: Leaves) -> bool:
    """Whether what is made of some tensors will have a gradient."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in leaves])  # noqa: C419 (faster)


def graph_tail(z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool) -> Tensor:
    """Compute `tail_formula` in what `torch.compile` takes into one graph. In inference, z may be overwritten."""
    if weights.moments is not None and not torch.is_grad_enabled():
        out = _graph_infer(z, shortcut, weights, relu)
        return tail_formula(z, shortcut, weights, relu) if out is None else out
    by_operators = _takes(z, shortcut, weights) and is_known(z.numel() >= _SMALL)
    return tail_formula(z, shortcut, weights, relu, operator_gains if by_operators else gains_of_map)


def graph_norm(z: Tensor, norm: Norm, act: int) -> Tensor | None:
    """Return what a norm and its activation make of a map that may be overwritten, None where no operator is called."""
    moments = Moments(norm.mean, norm.var)
    return _graph_infer(z, None, TailWeights(None, torch.sigmoid, *norm[:2], moments, None, None, norm.eps), act)


def _graph_infer(z: Tensor, shortcut: Tensor | None, weights: TailWeights, act: int) -> Tensor | None:
    return operator_infer(z, shortcut, weights, act) if worth_a_call(z) and _takes(z, shortcut, weights) else None


def _takes(z: Tensor, shortcut: Tensor | None, weights: TailWeights) -> bool:
    """Whether there are operators for a tail in a graph."""
    return _is_full(z) and weights.gate is torch.sigmoid and native.takes(z, shortcut, weights)


def worth_a_call(z: Tensor) -> bool:
    """Whether an operator in a graph for inference gains more by a map than a call takes."""
    return _is_full(z) and is_known(z.numel() >= _SMALL_INFERENCE)


def is_known(condition: Any) -> bool:
    """Whether something holds of all the sizes that a graph is made for, of which it shall not exclude any."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def _is_full(z: Tensor) -> bool:
    """Whether a map is of a type whose operators gain anything in a graph: not of half precision."""
    return z.dtype in (torch.float32, torch.float64)


class _FusedTail(torch.autograd.Function):
    """The autograd shell around the passes. Its output, and what it is made of besides leaves, was computed before."""

    @staticmethod
    def forward(ctx: Any, z, shortcut, weight, bias, kernel, made):
        out, pooled, mean, var, drop, ctx.rest = made
        ctx.save_for_backward(out if ctx.rest[3] else None, z, pooled, weight, bias, kernel, mean, var, drop)
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        engine, gate, eps, act, of_batch = ctx.rest
        # A batch of gradients has no storage, and one of a class of its own may have operations of its own.
        by_operations = torch.is_grad_enabled() or type(grad) is not Tensor or not torch._C._has_storage(grad)
        if engine is native and not by_operations:
            grads = native.gradients_of(grad, saved, eps, act, of_batch, wanted[0])
            return *[g if want else None for g, want in zip(grads, wanted)], None
        out, z, pooled, weight, bias, kernel, mean, var, drop = saved
        pooled = mean.expand(len(z), -1) if pooled is None else pooled  # which no result depends on without a gate
        weights = TailWeights(kernel, gate, weight, bias, Moments(mean, var), None, drop, eps)
        if torch.is_grad_enabled():
            grad = grad if out is None else passes.let_through(grad, out, act)
            return *_differentiable(grad, z, weights, wanted, of_batch), None
        z = z.contiguous(memory_format=layout_of(z))  # a hook on saved tensors may have laid it out anew, and out
        out = out if out is None else _as_format(out, z)
        given = _as_format(grad, z), out, z, pooled, weights, [*wanted[:5], of_batch]
        return *(passes.backward(*given, act) if by_operations else engine.backward(*given)), None


_record = super(torch.autograd.Function, _FusedTail).apply  # without the looks for what blocks have looked for already


def _differentiable(grad: Tensor, z: Tensor, weights: TailWeights, wanted: Any, of_batch: bool):
    """Return the gradients by differentiating the formula, so that they can be differentiated again."""
    # By aliases: what lies before z is other nodes' to go through, and a tensor's hooks run where its gradient arrives.
    leaves = (z, weights.weight, weights.bias, weights.kernel)
    inputs: list[Any] = [t if t is None else t.view_as(t) for t in leaves]
    z, weight, bias, kernel = inputs
    weights = weights._replace(weight=weight, bias=bias, kernel=kernel, moments=None if of_batch else weights.moments)
    result = tail_formula(z, None, weights, relu=False)
    asked = [t if want else None for t, want in zip(inputs, (wanted[0], *wanted[2:5]))]
    dz, *d_weights = passes.grads_of((result,), (grad,), asked, create_graph=True)
    return [dz, grad if wanted[1] else None, *d_weights]


def _as_format(grad: Tensor, z: Tensor) -> Tensor:
    """Return a gradient in the type and memory format of a map: pooling hands back expanded ones."""
    if grad.stride() == z.stride() and grad.dtype == z.dtype:
        return grad
    return grad.to(z.dtype).contiguous(memory_format=layout_of(z))

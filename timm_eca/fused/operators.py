"""The vectors between a tail's two reads of its map as PyTorch operators, for `torch.compile`.

A graph calls them where a compiler has no fast loops of its own: for the statistics, and for what follows from them.
What is done to the map with them is the compiler's, which has shortcut, norms and ReLU in the same loop.
`torch.ops.timm_eca.gains` and `gains_backward` take and give tensors alone. An empty tensor stands for what is not
asked for: in a graph an operator cannot return None, nor what it was given.
"""

from typing import Any

import torch
from torch import Tensor

from . import native
from .formula import Moments, Norm, TailWeights

__all__ = ["operator_gains", "operator_infer", "operator_norm_pool"]


def operator_gains(z: Tensor, weights: TailWeights) -> tuple[Tensor, Moments, Tensor, Tensor]:
    """As `formula.gains_of_map`, where `native.takes` its tensors.

    The map's mean is returned as a constant: the derivatives of the other two contain its own.
    """
    given = weights.moments or (None, None)
    rest = (weights.weight, weights.bias, weights.kernel, *given, weights.drop, weights.eps)
    pooled, mean, var, scale, offset = torch.ops.timm_eca.gains(z, *rest)
    return pooled, weights.moments or Moments(mean, var), scale, offset


def operator_infer(z: Tensor, shortcut: Tensor | None, weights: TailWeights, act: int) -> Tensor:
    """As `formula.tail_formula` by given moments, in the place of z."""
    kernel, _, weight, bias, moments, _, drop, eps, shortcut_norm, pooled = weights
    assert moments is not None
    *of_shortcut, shortcut_eps = shortcut_norm or (None, None, None, None, 0.0)
    vectors = (weight, bias, kernel, *moments, drop, pooled, *of_shortcut)
    torch.ops.timm_eca.graph_infer_(z, shortcut, *vectors, eps, shortcut_eps, act)
    return z


def operator_norm_pool(z: Tensor, norm: Norm, act: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `native.norm_pool`, where it takes its tensors."""
    *vectors, eps = norm
    return torch.ops.timm_eca.graph_norm_pool_(z, *vectors, eps, act, weight, bias)


def _fake_norm_pool(z, weight, bias, mean, var, eps, act, conv_weight, conv_bias):
    return z.new_empty((z.shape[0], conv_weight.shape[0]))


def _fake_gains(z, weight, bias, kernel, mean, var, drop, eps):
    pooled, scale, offset = (z.new_empty(z.shape[:2]) for _ in range(3))
    size = z.shape[1] if mean is None else 0
    return pooled, z.new_empty(size), z.new_empty(size), scale, offset


def _fake_backward(dots, total, pooled, weight, bias, kernel, mean, var, drop, eps, area, of_batch):
    return torch.empty_like(pooled), *(torch.empty_like(t) for t in (mean, mean, mean, kernel))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    z, weight, bias, kernel, mean, var, drop, ctx.eps = inputs
    ctx.of_batch = mean is None
    mean, var = output[1:3] if ctx.of_batch else (mean, var)
    pooled = output[0]
    ctx.mark_non_differentiable(*output[:3])
    ctx.save_for_backward(z, pooled, weight, bias, kernel, mean, var, drop)


def _grads(ctx: Any, _pooled: Any, _mean: Any, _var: Any, d_scale: Tensor, d_offset: Tensor) -> tuple[Any, ...]:
    z, pooled, weight, bias, kernel, mean, var, drop = ctx.saved_tensors
    shift, slope, *d_weights = torch.ops.timm_eca.gains_backward(
        d_scale, d_offset, pooled, weight, bias, kernel, mean, var, drop, ctx.eps, z.shape[2:].numel(), ctx.of_batch
    )
    dz = shift[..., None, None].expand_as(z)
    if ctx.of_batch:
        dz = torch.addcmul(dz, z - mean[:, None, None], slope[:, None, None])
    d_weights = [d if want else None for d, want in zip(d_weights, ctx.needs_input_grad[1:4])]
    return dz, *d_weights, None, None, None, None


def _no_grads(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("timm_eca::gains_backward has no derivative: take second derivatives of a model not compiled.")


def _register() -> None:
    fake: dict[str, Any] = {"gains": _fake_gains, "gains_backward": _fake_backward}
    grads: dict[str, Any] = {"gains": (_grads, _setup_context), "gains_backward": (_no_grads, None)}
    torch.library.register_fake("timm_eca::graph_infer_", lambda *_: None)
    torch.library.register_fake("timm_eca::graph_norm_pool_", _fake_norm_pool)
    for name, (backward, setup_context) in grads.items():
        torch.library.register_fake(f"timm_eca::{name}", fake[name])
        torch.library.register_autograd(f"timm_eca::{name}", backward, setup_context=setup_context)


if native.defined_now:
    _register()

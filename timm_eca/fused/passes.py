"""A tail and its gradients in PyTorch's operations: on any device, and keeping no map but z.

The oracle between the formula and the compiled passes of `native.py`: the same steps, each one operation.
"""

from typing import Any

import torch
from torch import Tensor

from .formula import Act, Moments, TailWeights, gains, normed_shortcut, update_running, vector_dtype

__all__ = ["backward", "forward", "let_through"]


@torch.no_grad()
def forward(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, inplace: bool
) -> tuple[Tensor, Tensor, Moments]:
    """Return a tail's output, z pooled (B, C), and the moments z was normed by; in place z is overwritten."""
    dtype = vector_dtype(z)
    x = z.to(dtype)  # half precision would lose, or overflow in, what cancels
    pooled = x.mean((2, 3)) if weights.pooled is None else weights.pooled
    moments = weights.moments or Moments(pooled.mean(0), _batch_var(z, dtype))
    update_running(weights.running, moments, z)
    scale, offset = gains(pooled, moments, weights)
    shift = torch.addcmul(offset, scale, pooled, value=-1)
    into = x if inplace or x is not z else None
    if shortcut is None:
        out = torch.addcmul(_as_map(shift, x), x, _as_map(scale, x), out=into)
    else:
        added = normed_shortcut(shortcut.to(dtype), weights)
        out = torch.addcmul(added, x, _as_map(scale, x), out=into).add_(_as_map(shift, x))
    out = out.relu_() if relu else out
    if x is not z:
        out = z.copy_(out) if inplace else out.to(z.dtype)
    return out, pooled, moments


def backward(
    grad: Tensor,
    out: Tensor | None,
    z: Tensor,
    pooled: Tensor,
    weights: TailWeights,
    wanted: list[bool],
    act: int = Act.RELU,
) -> list[Tensor | None]:
    """Return the gradients of z, shortcut, weight, bias and kernel, those that are wanted.

    Args:
        grad: Gradient of the output (B, C, H, W).
        out: The output where an activation made it, else None.
        z: Map before the norm.
        pooled: z pooled (B, C).
        weights: What the tail computed with; the moments are those it was normed by.
        wanted: Which of the five are wanted, and sixth, whether the moments were those of the batch.
        act: The `Act` that made the output.
    """
    for_z, for_shortcut, *for_weights, of_batch = wanted
    grad = grad if out is None else let_through(grad, out, act)
    x, g = z.to(pooled.dtype), grad.to(pooled.dtype)
    total = g.sum((2, 3))
    dots = (g * x).sum((2, 3)).addcmul_(pooled, total, value=-1)
    leaves, outputs = _vector_graph(pooled, weights, [for_z, for_z and of_batch, *for_weights], of_batch)
    d_pooled, d_var, *d_weights = grads_of(outputs, (dots, total), leaves)
    dz = None
    if for_z:
        assert d_pooled is not None
        scale = outputs[0].detach()
        # z reaches the result by itself, times scale; by its mean, which is also subtracted; and by its variance.
        shift = torch.addcmul(d_pooled, scale, total, value=-1).div_(z[0, 0].numel())
        if d_var is not None:
            slope = d_var * (2 / z[:, 0].numel())
            shift = shift.addcmul_(slope, pooled.mean(0), value=-1)
            dz = torch.addcmul(_as_map(shift, x), x, _as_map(slope, x)).addcmul_(g, _as_map(scale, x))
        else:
            dz = torch.addcmul(_as_map(shift, x), g, _as_map(scale, x))
        dz = dz.to(z.dtype)
    return [dz, grad if for_shortcut else None, *d_weights]


def let_through(grad: Tensor, out: Tensor, act: int) -> Tensor:
    """Return the gradient of what an activation, a ReLU or ReLU6, was given, from what it made of that."""
    if act == Act.RELU6:
        return torch.ops.aten.hardtanh_backward(grad, out, 0, 6)
    return torch.ops.aten.threshold_backward(grad, out, 0)


def grads_of(outputs: Any, grads: Any, inputs: Any, create_graph: bool = False) -> list[Tensor | None]:
    """Return the gradients of those inputs that require one, None for the others."""
    asked = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, grads, create_graph=create_graph) if asked else ())
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _vector_graph(pooled: Tensor, weights: TailWeights, wanted: list[bool], of_batch: bool) -> Any:
    """Compute the gains anew, as a graph of vectors from the leaves that want a gradient."""
    assert weights.moments is not None
    mean, var = weights.moments
    with torch.enable_grad():
        leaves: list[Any] = [
            t if t is None else t.detach().requires_grad_(want)
            for t, want in zip((pooled, var, weights.weight, weights.bias, weights.kernel), wanted)
        ]
        pooled_, var_, weight, bias, kernel = leaves
        moments = Moments(pooled_.mean(0) if of_batch else mean, var_)
        return leaves, gains(pooled_, moments, weights._replace(weight=weight, bias=bias, kernel=kernel))


def _batch_var(z: Tensor, dtype: torch.dtype) -> Tensor:
    if z.device.type == "cpu":  # var is far slower there
        return torch.batch_norm_update_stats(z, None, None, 0.0)[1].to(dtype)
    return torch.var(z.to(dtype), (0, 2, 3), correction=0)


def _as_map(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype)[..., None, None]

"""What the tail of a residual block computes: norm, ECA, drop path, addition and ReLU, as one formula.

With z the map before the norm, m and v its statistics, gamma, beta and eps the norm's, p the mean of z over the map:

    scale = gamma / sqrt(v + eps)
    q = (p - m) * scale + beta                 what ECA pools: the mean of the normed map
    w = sigmoid(C1D_k(q)) * drop               Eq. 9 of the paper; drop is the drop path's factor of each sample
    out = relu(w * scale * (z - p) + w * q + shortcut)

So z is read for its statistics and once more for the result, and all in between are vectors. The plain path keeps the
normed map for the gradient of w. That gradient is scale times the sum over the map of grad * (z - p), plus q times the
sum of grad: z, which the norm keeps anyway, serves both.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Act",
    "Moments",
    "Norm",
    "Running",
    "TailWeights",
    "gains",
    "gains_of_map",
    "layout_of",
    "map_mean",
    "normed_shortcut",
    "tail_formula",
    "update_running",
    "vector_dtype",
]


class Act(IntEnum):
    """What ends what is computed at once, numbered as the compiled passes have it: false for nothing, true for ReLU."""

    NONE = 0
    RELU = 1
    RELU6 = 2


class Moments(NamedTuple):
    """Mean and biased variance of each channel, (C,)."""

    mean: Tensor
    var: Tensor


class Running(NamedTuple):
    """Running statistics to update.

    Attributes:
        mean: Mean (C,).
        var: Unbiased variance (C,).
        factor: The weight of the batch's; None for one over the batches seen.
        seen: The batches seen (), None where they are not counted.
    """

    mean: Tensor
    var: Tensor
    factor: float | None
    seen: Tensor | None = None


class Norm(NamedTuple):
    """A batch norm by given moments: all (C,), weight and bias None for one and zero."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what it multiplies by, and then adds."""
        scale = (self.var.to(dtype) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(dtype)
        shift = -self.mean.to(dtype) * scale
        return scale, shift if self.bias is None else shift + self.bias.to(dtype)


class TailWeights(NamedTuple):
    """What a tail computes with besides its maps.

    Attributes:
        kernel: ECA's kernel (1, 1, k), None where there is no attention: w is drop.
        gate: ECA's gate, a function of one tensor; the compiled passes take `torch.sigmoid` alone.
        weight: The norm's weight gamma (C,), None for one.
        bias: The norm's bias beta (C,), None for zero.
        moments: The norm's statistics, None where they are those of the batch.
        running: Statistics that the batch's update, None where none are kept.
        drop: Factor of each sample (B, 1), None for one.
        eps: The norm's epsilon.
        shortcut_norm: The norm that the shortcut has yet to go through, None where it is added as it is. For
            inference alone: it gets no gradient.
        pooled: z's mean over the map (B, C), None where it is not known yet. For given moments alone.
    """

    kernel: Tensor | None
    gate: Callable[[Tensor], Tensor]
    weight: Tensor | None
    bias: Tensor | None
    moments: Moments | None
    running: Running | None
    drop: Tensor | None
    eps: float
    shortcut_norm: Norm | None = None
    pooled: Tensor | None = None


GainsOf = Callable[[Tensor, TailWeights], tuple[Tensor, Moments, Tensor, Tensor]]
"""What returns a map's mean (B, C), its moments, w * scale and w * q (B, C): `gains_of_map`, or as it."""


def gains_of_map(z: Tensor, weights: TailWeights) -> tuple[Tensor, Moments, Tensor, Tensor]:
    """Return a map's mean (B, C), the moments, w * scale and w * q (B, C)."""
    x = z.to(vector_dtype(z))
    pooled = map_mean(x) if weights.pooled is None else weights.pooled
    moments = weights.moments or _batch_moments(x, pooled)
    return pooled, moments, *gains(pooled, moments, weights)


def map_mean(x: Tensor) -> Tensor:
    """Return the mean (B, C) over a map."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.is_cpu:
        # The compiler makes maps channels_last there. Of one mean it makes a walk through the whole map for every few
        # channels; of these, one for every few channels of a row, which is still in the cache.
        return x.mean(3).mean(2)
    return x.mean((2, 3))


def tail_formula(
    z: Tensor, shortcut: Tensor | None, weights: TailWeights, relu: bool, gains_of: GainsOf = gains_of_map
) -> Tensor:
    """Compute a tail (B, C, H, W) in plain differentiable operations, for compilers and for second derivatives.

    Args:
        z: Map before the norm (B, C, H, W).
        shortcut: What is added, of z's shape and type, or None.
        weights: What the tail computes with.
        relu: Whether a ReLU ends it.
        gains_of: What finds the vectors.
    """
    pooled, moments, scale, offset = gains_of(z, weights)
    update_running(weights.running, moments, z)
    x = z.to(pooled.dtype)
    out = ((x - pooled[..., None, None]) * scale[..., None, None] + offset[..., None, None]).to(z.dtype)
    if shortcut is not None:
        out = out + normed_shortcut(shortcut, weights)
    return torch.relu(out) if relu else out


def normed_shortcut(shortcut: Tensor, weights: TailWeights) -> Tensor:
    """Return what is added: the shortcut, through its norm if that is yet to come."""
    if weights.shortcut_norm is None:
        return shortcut
    scale, shift = (v.to(shortcut.dtype)[:, None, None] for v in weights.shortcut_norm.affine(vector_dtype(shortcut)))
    return torch.addcmul(shift, shortcut, scale)


def update_running(running: Running | None, moments: Moments, z: Tensor) -> None:
    """Update running statistics by those of a batch, as `torch.nn.BatchNorm2d` does."""
    if running is None:
        return
    values = z[:, 0].numel()
    with torch.no_grad(), _as_same_version(running):
        factor = _factor_of(running)
        running.mean.lerp_(moments.mean.to(running.mean.dtype), factor)
        running.var.lerp_((moments.var * (values / (values - 1))).to(running.var.dtype), factor)


def _as_same_version(running: Running) -> AbstractContextManager[None]:
    """Have statistics that were saved for a backward pass pass for those: batch norm's update does not count either."""
    if torch.compiler.is_compiling() or running.mean.is_inference():  # those have no version
        return nullcontext()
    return torch.autograd._unsafe_preserve_version_counter((running.mean, running.var))


def _factor_of(running: Running) -> float | Tensor:
    """Count the batch, and return its weight."""
    factor, seen = running.factor, running.seen
    if seen is not None:
        seen.add_(1)
        if factor is None:  # in a graph a number would break it
            return 1 / (seen.to(running.mean.dtype) if torch.compiler.is_compiling() else float(seen))
    return 0.0 if factor is None else factor


def gains(pooled: Tensor, moments: Moments, weights: TailWeights) -> tuple[Tensor, Tensor]:
    """Return w * scale and w * q, both (B, C), given the pooled map. Differentiable; vectors only."""
    dtype = pooled.dtype
    scale = (moments.var.to(dtype) + weights.eps).rsqrt()
    if weights.weight is not None:
        scale = scale * weights.weight.to(dtype)
    q = (pooled - moments.mean.to(dtype)) * scale
    if weights.bias is not None:
        q = q + weights.bias.to(dtype)
    w = torch.ones_like(q) if weights.kernel is None else weights.gate(_channel_conv(q, weights.kernel.to(dtype)))
    if weights.drop is not None:
        w = w * weights.drop.to(dtype)
    return w * scale, w * q


def _channel_conv(q: Tensor, kernel: Tensor) -> Tensor:
    """Convolve along the channels of (B, C), in the type that q has, autocast or not."""
    size, channels = kernel.shape[2], q.shape[1]
    if torch.compiler.is_compiling():  # which makes one loop of this, and a call of a convolution
        padded = functional.pad(q, (size // 2, size // 2))
        taps = kernel.clone()  # in inference mode a graph cannot hold views of a parameter
        return reduce(torch.add, (padded[:, j : j + channels] * taps[0, 0, j] for j in range(size)))
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return _channel_conv(q, kernel)
    return functional.conv1d(q[:, None], kernel, padding=size // 2)[:, 0]


def vector_dtype(z: Tensor) -> torch.dtype:
    """Return the type of a map's statistics and gains: float32 for half precision, as batch norm has it."""
    return torch.promote_types(z.dtype, torch.float32)


def layout_of(z: Tensor) -> torch.memory_format:
    """Return the memory format of a map."""
    return torch.contiguous_format if z.is_contiguous() else torch.channels_last


def _batch_moments(x: Tensor, pooled: Tensor) -> Moments:
    mean = pooled.mean(0)
    return Moments(mean, (x - mean[:, None, None]).square().mean((0, 2, 3)))

"""The mean of a map from what the convolution that makes it gets: the two commute, GAP(W u + b) = W GAP(u) + b.

In inference the norm before that convolution sums what it writes (`SummedNorm`), so the block's gate is known without a
read of either map. A convolution of 3x3 meets with each of its taps all pixels but those of one border or two, as
padding has zeros there. Where that norm does not go through the compiled passes, a bottleneck's u is read, a quarter of
what would be to read of z (`pooled_before`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import native
from .formula import map_mean
from .norms import InnerNorm
from .operators import operator_norm_pool
from .tail import is_known, worth_a_call

__all__ = ["SummedNorm", "commutes", "compiled_pool", "graph_pool", "may_pool", "pooled_before"]

PoolOf = Callable[[InnerNorm, Any, Tensor], Tensor | None]

_LARGE = 1 << 20  # elements of z; less is read in the time of a call
# The time of the convolution's weights, in fifths of that in which as many elements of z are read: to come from memory,
# and to be multiplied, for each sample.
_LOADED, _MULTIPLIED = 10, 1


class SummedNorm:
    """The norm before a block's last convolution, for one call.

    Attributes:
        pooled: The mean (B, C) of what the convolution is about to make, None where it is not known by then.
    """

    def __init__(self, norm: InnerNorm, conv: Any, pool_of: PoolOf):
        """Take the norm, the convolution, and what does both at once: `compiled_pool`, or in a graph `graph_pool`."""
        self.norm, self.conv, self.pool_of = norm, conv, pool_of
        self.pooled: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return what the norm makes of a map, which is overwritten."""
        if not self.norm.norm.of_batch:
            self.pooled = self.pool_of(self.norm, self.conv, z)
        return self.norm(z) if self.pooled is None else z


def compiled_pool(norm: InnerNorm, conv: Any, z: Tensor) -> Tensor | None:
    """Put a norm in the place of z, and return the mean of what a convolution makes of that.

    None where that does not pay, or the passes do not take such tensors.

    Args:
        norm: A norm with its activation, by given moments.
        conv: A convolution that commutes with the mean.
        z: What the norm gets (B, D, H, W).
    """
    weight = conv._parameters.get("weight")
    if type(z) is not Tensor or weight is None or not _pays(conv, z):
        return None
    *vectors, eps = norm.norm.given()
    return native.norm_pool(z, tuple(vectors), eps, norm.act, weight, conv.bias)


def graph_pool(norm: InnerNorm, conv: Any, z: Tensor) -> Tensor | None:
    """As `compiled_pool`, in what `torch.compile` takes into one graph."""
    given = norm.norm.given()
    if not (worth_a_call(z) and is_known(_pays(conv, z)) and native.takes_conv(z, conv.weight, conv.bias, given)):
        return None
    return operator_norm_pool(z, given, norm.act, conv.weight, conv.bias)


def commutes(conv: nn.Conv2d) -> bool:
    """Whether the mean of what a convolution makes follows from sums of what it gets."""
    if conv.groups != 1 or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return False
    of_three = conv.kernel_size == (3, 3) and conv.padding in ((1, 1), "same") and conv.padding_mode == "zeros"
    return of_three or (conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid", "same"))


def may_pool(conv: nn.Conv2d) -> bool:
    """Whether the mean of what a convolution makes may be had by reading what it gets, for less than half the reads."""
    return 2 * conv.in_channels < conv.out_channels and _is_matrix(conv)


def pooled_before(conv: nn.Conv2d, u: Tensor) -> Tensor | None:
    """Return the mean (B, C) of z = conv(u) over the map, None where it is better read from z.

    Args:
        conv: A convolution.
        u: What it gets (B, D, H, W).
    """
    if torch.compiler.is_compiling() and u.is_cpu and native.loaded():
        return None  # compilers make a slow loop of it there, and there is an operator that reads z
    batch, _, height, width = u.shape
    channels, made, area = conv.in_channels, conv.out_channels, height * width
    if batch * made * area < _LARGE:
        return None
    # Reading u, and W once a sample, has to be less than half of reading z.
    if 2 * channels * (area + made) > made * area or not (_is_matrix(conv) and _is_exact(conv, u)):
        return None
    return functional.linear(map_mean(u), conv.weight.flatten(1), conv.bias)


def _pays(conv: Any, norm_map: Tensor) -> bool:
    """Whether a convolution has few enough weights for a map of it that is not read, given what its norm gets."""
    squared = conv.in_channels**2 * conv.kernel_size[0] ** 2  # what weights and maps have of the other width cancels
    return commutes(conv) and 5 * norm_map.numel() >= squared * (_LOADED + _MULTIPLIED * len(norm_map))


def _is_matrix(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and commutes(conv)


def _is_exact(conv: nn.Conv2d, u: Tensor) -> bool:
    """Whether z is not rounded to a type of less digits than its mean has."""
    exact = u.dtype == conv.weight.dtype and u.dtype in (torch.float32, torch.float64)
    return exact and not torch.is_autocast_enabled(u.device.type)

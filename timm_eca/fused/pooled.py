"""The mean of a map from what a 1x1 convolution made it of: the two commute, GAP(W u + b) = W GAP(u) + b.

A bottleneck's last convolution makes four channels of one, so its input is a quarter of what is to be read.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .formula import map_mean

__all__ = ["may_pool", "pooled_before"]

_LARGE = 1 << 20  # elements of z; less is read in the time of a call


def may_pool(conv: nn.Conv2d) -> bool:
    """Whether the mean of what a convolution makes may be had from what it gets, for less than half the reads."""
    return 2 * conv.in_channels < conv.out_channels and _is_matrix(conv)


def pooled_before(conv: nn.Conv2d, u: Tensor) -> Tensor | None:
    """Return the mean (B, C) of z = conv(u) over the map, None where it is better read from z.

    Args:
        conv: A convolution.
        u: What it gets (B, D, H, W).
    """
    batch, _, height, width = u.shape
    channels, made, area = conv.in_channels, conv.out_channels, height * width
    if batch * made * area < _LARGE:
        return None
    # Reading u, and W once a sample, has to be less than half of reading z.
    if 2 * channels * (area + made) > made * area or not (_is_matrix(conv) and _is_exact(conv, u)):
        return None
    return functional.linear(map_mean(u), conv.weight.flatten(1), conv.bias)


def _is_matrix(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")


def _is_exact(conv: nn.Conv2d, u: Tensor) -> bool:
    """Whether z is not rounded to a type of less digits than its mean has."""
    exact = u.dtype == conv.weight.dtype and u.dtype in (torch.float32, torch.float64)
    return exact and not torch.is_autocast_enabled(u.device.type)

"""Dual attention.

Paper: Dual Attention Network for Scene Segmentation, CVPR 2019, https://arxiv.org/abs/1809.02983.
"""

import torch
from torch import nn

from .checks import reduced_channels
from .registry import register_attn

__all__ = ["DualAttn"]


@register_attn("da")
class DualAttn(nn.Module):
    """Self-attention over positions (Eq. 1, 2) and over channels (Eq. 3, 4), both added to the input.

    out = x + alpha * position(x) + beta * channel(x). Both scales start at zero, so that the layer starts as the
    identity. DAN sums the two modules' outputs, each with a shortcut of its own behind a convolution of its own;
    here, where both see the same x, there is one shortcut.

    Args:
        channels: Number of channels C of the input.
        reduction: By which the width of queries and keys divides the channels; at least one channel is left.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If channels or reduction is not a positive integer.
    """

    def __init__(self, channels: int, reduction: int = 8, device=None, dtype=None):
        super().__init__()
        channels, width = reduced_channels(channels, reduction)
        self.query = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.key = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.value = nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def position(self, x: torch.Tensor) -> torch.Tensor:
        """Return each position's mean of the values, weighted by softmax(query . key): (B, C, H, W) to the same."""
        query, key, value = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        attention = torch.bmm(query.transpose(1, 2), key).softmax(-1)  # (B, N, N), rows sum to one
        return torch.bmm(value, attention.transpose(1, 2)).reshape(x.shape)

    def channel(self, x: torch.Tensor) -> torch.Tensor:
        """Return each channel's mean of the channels, weighted by softmax(x x^T): (B, C, H, W) to the same."""
        return _mean_of_channels(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * self.position(x) + self.beta * self.channel(x)


@torch.fx.wrap  # traced through, it would lose the context
def _mean_of_channels(x: torch.Tensor) -> torch.Tensor:
    """Compute `channel` in float32 at least, autocast or not: x x^T sums over positions, too much for float16."""
    if torch.jit.is_scripting():  # where autocast takes no device of a tensor
        return _mean_in_wide_type(x)
    else:
        with torch.autocast(x.device.type, enabled=False):
            return _mean_in_wide_type(x)


def _mean_in_wide_type(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    attention = torch.bmm(flat, flat.transpose(1, 2)).softmax(-1)  # (B, C, C), rows sum to one
    return torch.bmm(attention, flat).reshape(x.shape).to(x.dtype)

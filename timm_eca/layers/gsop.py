"""Global second-order pooling.

Paper: Global Second-order Pooling Convolutional Networks, CVPR 2019, https://arxiv.org/abs/1811.12006, Section 3.1.
"""

import torch
from torch import nn

from .channel_gate import ChannelGate
from .checks import positive_int
from .registry import register_attn

__all__ = ["Gsop", "covariance"]


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Return the covariances of channels over positions, (B, C, H, W) -> (B, C, C), divided by H W."""
    centred = x.flatten(2) - x.mean((2, 3)).unsqueeze(-1)
    centred = centred / centred.shape[-1] ** 0.5  # before the sum over positions, which float16 could not hold
    return torch.bmm(centred, centred.transpose(1, 2))


@register_attn("gsop")
class Gsop(ChannelGate):
    """The block of GSoP-Net1: channel gates from the channels' covariances.

    A 1x1 convolution reduces to c channels; their c x c covariance matrix passes a row-wise convolution, one group
    for each row with four outputs, then a 1x1 convolution back to C channels and a sigmoid.

    Args:
        channels: Number of channels C of the input.
        reduced_channels: c, 128 in the paper.
        device: Device of the weights.
        dtype: Data type of the weights.

    Raises:
        ValueError: If channels or reduced_channels is not a positive integer.
    """

    def __init__(self, channels: int, reduced_channels: int = 128, device=None, dtype=None):
        super().__init__()
        channels, c = positive_int("channels", channels), positive_int("reduced_channels", reduced_channels)
        self.reduce = nn.Conv2d(channels, c, 1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(c, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.row_norm = nn.BatchNorm1d(c, device=device, dtype=dtype)
        self.row_conv = nn.Conv1d(c, 4 * c, c, groups=c, device=device, dtype=dtype)
        self.expand = nn.Conv1d(4 * c, channels, 1, device=device, dtype=dtype)

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gates, one per sample and channel: (B, C, H, W) -> (B, C)."""
        rows = self.row_norm(covariance(self.act(self.norm(self.reduce(x)))))
        return self.expand(self.row_conv(rows)).squeeze(-1).sigmoid()

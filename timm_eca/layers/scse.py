"""Concurrent spatial and channel squeeze and excitation.

Paper: Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks, MICCAI 2018,
https://arxiv.org/abs/1803.02579.
"""

import torch
from torch import nn

from .checks import reduced_channels
from .registry import register_attn

__all__ = ["ScSe"]


@register_attn("scse")
class ScSe(nn.Module):
    """out = x * sigmoid(W2 relu(W1 mean(x))) + x * sigmoid(w . x): cSE (Eq. 2) plus sSE (Eq. 3), as in Section 2.3.

    Args:
        channels: Number of channels C of the input.
        reduction: By which the hidden width of cSE divides the channels, 2 in the paper; at least one
            channel is left.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If channels or reduction is not a positive integer.
    """

    def __init__(self, channels: int, reduction: int = 2, device=None, dtype=None):
        super().__init__()
        channels, hidden = reduced_channels(channels, reduction)
        self.fc1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, device=device, dtype=dtype)
        self.spatial = nn.Conv2d(channels, 1, 1, bias=False, device=device, dtype=dtype)

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return cSE's gates, one per sample and channel: (B, C, H, W) -> (B, C)."""
        return self.fc2(self.act(self.fc1(x.mean((2, 3))))).sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.channel_weights(x)[:, :, None, None] + x * self.spatial(x).sigmoid()

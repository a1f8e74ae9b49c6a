"""Squeeze-and-excitation as the ECA-Net paper counts it: two linear maps without biases.

Papers: Squeeze-and-Excitation Networks, CVPR 2018, https://arxiv.org/abs/1709.01507, Eq. 3;
ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151, Eq. 2 and the row SE of Table 2.
"""

import torch
from torch import nn

from .channel_gate import ChannelGate
from .checks import reduced_channels
from .registry import register_attn

__all__ = ["SePaper"]


@register_attn("se_paper")
class SePaper(ChannelGate):
    """Squeeze-and-excitation with logits W2 relu(W1 y), 2 C^2 / r weights (C at least r).

    timm's 'se' has biases and rounds the hidden width to a multiple of 8; this one does neither.

    Args:
        channels: Number of channels C of the input.
        reduction: r, by which the hidden width divides the channels; 16 in the ResNets, 8 in MobileNetV2. At
            least one channel is left.
        device: Device of the weights.
        dtype: Data type of the weights.

    Raises:
        ValueError: If channels or reduction is not a positive integer.
    """

    def __init__(self, channels: int, reduction: int = 16, device=None, dtype=None):
        super().__init__()
        channels, hidden = reduced_channels(channels, reduction)
        self.fc1 = nn.Linear(channels, hidden, bias=False, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(y)))

"""ECA without shared weights.

Paper: ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151, Eq. 6 and 7 and the row ECA-NS of Table 2.
"""

import torch
from torch import nn

from .channel_gate import ChannelGate
from .checks import positive_int
from .eca import chosen_kernel_size
from .registry import register_attn

__all__ = ["EcaNs"]


@register_attn("eca_ns")
class EcaNs(ChannelGate):
    """ECA-NS: logits W_k y with a band matrix, every channel with k weights of its own; k C weights.

    Its state dict holds exactly `conv.weight` of shape (C, 1, k), as the authors' ECA-NS checkpoints do.

    Args:
        channels: Number of channels C of the input.
        kernel_size: Odd width k of the band. None: `adaptive_kernel_size(channels)`.
        device: Device of the weights.
        dtype: Data type of the weights.

    Raises:
        ValueError: If channels is not a positive integer, or kernel_size not an odd one.
    """

    def __init__(self, channels: int, kernel_size: int | None = None, device=None, dtype=None):
        super().__init__()
        channels = positive_int("channels", channels)
        k = chosen_kernel_size(channels, kernel_size)
        self.kernel_size = k
        self.conv = nn.Conv1d(channels, channels, k, groups=channels, bias=False, device=device, dtype=dtype)

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        # Each channel's neighbourhood becomes a signal of length k, on which a depthwise kernel is a dot product.
        half = self.kernel_size // 2
        neighbours = nn.functional.pad(y, (half, half)).unfold(1, self.kernel_size, 1)
        return self.conv(neighbours).squeeze(-1)

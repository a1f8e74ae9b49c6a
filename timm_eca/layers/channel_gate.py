"""What the channel attention modules of ECA-Net's Table 2 share: pool, transform, sigmoid, multiply."""

import torch
from torch import nn

__all__ = ["ChannelGate"]


class ChannelGate(nn.Module):
    """Channel attention: out = x * sigmoid(logits(mean over H, W of x)), Eq. 1 of ECA-Net.

    Subclasses say what `logits` is; Table 2 of the paper compares such choices.

    Shape:
        input (B, C, H, W), output (B, C, H, W) in the memory format of the input.
    """

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        """Return what the sigmoid turns into gates: pooled features (B, C) -> (B, C)."""
        raise NotImplementedError

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gates, one per sample and channel: (B, C, H, W) -> (B, C)."""
        return self.logits(x.mean((2, 3))).sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.channel_weights(x)[:, :, None, None]

"""Double attention.

Paper: A^2-Nets: Double Attention Networks, NeurIPS 2018, https://arxiv.org/abs/1810.11579.
"""

import torch
from torch import nn

from .checks import reduced_channels
from .registry import register_attn

__all__ = ["DoubleAttn"]


@register_attn("a2")
class DoubleAttn(nn.Module):
    """Gather features by attention over positions, then distribute them to each position by attention.

    Z = [phi(X) softmax(theta(X))^T] softmax(rho(X)), Eq. 6: the first softmax runs over the positions and the
    second over the n gathered vectors. out = x + expand(Z), where phi, theta, rho, expand are 1x1 convolutions.

    Args:
        channels: Number of channels C of the input.
        reduction: By which the widths m and n of phi and of theta and rho divide the channels; at least one
            channel is left.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If channels or reduction is not a positive integer.
    """

    def __init__(self, channels: int, reduction: int = 4, device=None, dtype=None):
        super().__init__()
        channels, width = reduced_channels(channels, reduction)
        self.phi = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.theta = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.rho = nn.Conv2d(channels, width, 1, device=device, dtype=dtype)
        self.expand = nn.Conv2d(width, channels, 1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.phi(x).flatten(2)  # (B, m, N)
        gather = self.theta(x).flatten(2).softmax(-1)  # (B, n, N)
        distribute = self.rho(x).flatten(2).softmax(1)  # (B, n, N)
        z = torch.bmm(torch.bmm(features, gather.transpose(1, 2)), distribute)
        return x + self.expand(z.unflatten(2, (x.shape[2], x.shape[3])))

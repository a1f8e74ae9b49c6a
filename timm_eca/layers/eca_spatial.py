"""ECA followed by a spatial gate: the future work that the ECA-Net paper names in its conclusion.

Papers: ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151; the spatial gate is that of CBAM: Convolutional Block
Attention Module, ECCV 2018, https://arxiv.org/abs/1807.06521, Eq. 2 and 3, in timm's implementation.
"""

import torch
from timm.layers.cbam import SpatialAttn
from torch import nn

from .checks import odd_kernel_size
from .eca import EcaLayer
from .registry import register_attn

__all__ = ["EcaSpatial"]


@register_attn("eca_spatial")
class EcaSpatial(nn.Module):
    """Channel attention of ECA, then spatial attention of CBAM, in CBAM's order.

    out = z * sigmoid(BN(conv(mean and max of z over the channels))) with z = ECA(x).

    Args:
        channels: Number of channels C of the input.
        kernel_size: Odd kernel size of ECA. None: adaptive.
        spatial_kernel_size: Odd kernel size of the spatial gate's convolution, 7 in CBAM.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If channels is not a positive integer, or a kernel size not an odd one.
    """

    def __init__(
        self, channels: int, kernel_size: int | None = None, spatial_kernel_size: int = 7, device=None, dtype=None
    ):
        super().__init__()
        self.channel = EcaLayer(channels, kernel_size, device=device, dtype=dtype)
        self.spatial = SpatialAttn(
            odd_kernel_size(spatial_kernel_size, "spatial_kernel_size"), device=device, dtype=dtype
        )

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return ECA's gates, one per sample and channel: (B, C, H, W) -> (B, C)."""
        return self.channel.channel_weights(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spatial(self.channel(x))

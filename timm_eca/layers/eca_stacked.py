"""ECA with more than one 1-D convolution.

Paper: supplement B of ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151. One more convolution gained about 0.1 %
there, further ones lost.
"""

import torch
from timm.layers import LayerType
from torch import nn

from .channel_gate import ChannelGate
from .checks import activation, positive_int
from .eca import chosen_kernel_size

__all__ = ["EcaStacked"]


class EcaStacked(ChannelGate):
    """ECA whose logits are several 1-D convolutions over the channel axis, one after another; depth * k weights.

    The supplement does not say that anything stands between the convolutions, so by default nothing does.

    Args:
        channels: Number of channels C of the input.
        depth: Number of convolutions.
        kernel_size: Odd kernel size k of each. None: `adaptive_kernel_size(channels)`.
        inner_act_layer: Activation between the convolutions.
        device: Device of the weights.
        dtype: Data type of the weights.

    Raises:
        ValueError: If channels or depth is not a positive integer, kernel_size not an odd one, or inner_act_layer
            no activation.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 2,
        kernel_size: int | None = None,
        inner_act_layer: LayerType | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        channels, depth = positive_int("channels", channels), positive_int("depth", depth)
        k = chosen_kernel_size(channels, kernel_size)
        self.convs = nn.ModuleList(
            nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype) for _ in range(depth)
        )
        self.act = nn.Identity() if inner_act_layer is None else activation("inner_act_layer", inner_act_layer)()

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        y = y.unsqueeze(1)
        for index, conv in enumerate(self.convs):
            y = conv(y if index == 0 else self.act(y))
        return y.squeeze(1)

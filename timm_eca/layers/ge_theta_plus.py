"""Gather-Excite with parameters in both halves, GE-theta-plus.

Paper: Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks, NeurIPS 2018,
https://arxiv.org/abs/1810.12348, Section 3.3 and 4.
"""

import torch
from torch import nn

from .checks import positive_int, reduced_channels, size_of_map
from .registry import register_attn

__all__ = ["GeThetaPlus"]


def _depthwise(channels: int, kernel_size, stride: int, padding: int, **placed) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False, **placed)
    return nn.Sequential(conv, nn.BatchNorm2d(channels, **placed))


@register_attn("ge_theta_plus")
class GeThetaPlus(nn.Module):
    """out = x * sigmoid(interpolate(MLP(gather(x)))), with a learned gather of depthwise convolutions.

    An extent e, a power of two, is gathered by log2(e) depthwise 3x3 convolutions of stride 2; the global extent
    by one depthwise convolution as large as the input. The MLP is that of squeeze-and-excitation, as 1x1
    convolutions; the interpolation takes the nearest neighbour.

    timm's 'ge' has these parts too, with average pooling as its default gather.

    Args:
        channels: Number of channels C of the input.
        extent: Extent e; not used where feat_size is given.
        feat_size: Height and width of the input. Makes the extent global: inputs must be of this size.
        reduction: By which the hidden width of the MLP divides the channels; at least one channel is left.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If channels or reduction is not a positive integer, or extent not a power of two from 2 on;
            in forward, if the input is not of feat_size.
    """

    def __init__(
        self,
        channels: int,
        extent: int = 8,
        feat_size: tuple[int, int] | None = None,
        reduction: int = 16,
        device=None,
        dtype=None,
    ):
        super().__init__()
        channels, hidden = reduced_channels(channels, reduction)
        placed = {"device": device, "dtype": dtype}
        self.feat_size = None if feat_size is None else size_of_map("feat_size", feat_size)
        self.gather = nn.Sequential()
        if self.feat_size is not None:
            self.gather.append(_depthwise(channels, self.feat_size, 1, 0, **placed))
        else:
            for index in range(_log2("extent", extent)):
                if index:
                    self.gather.append(nn.ReLU())
                self.gather.append(_depthwise(channels, 3, 2, 1, **placed))
        self.fc1 = nn.Conv2d(channels, hidden, 1, **placed)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1, **placed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.feat_size is not None:
            self._check_size(x.shape[2], x.shape[3])
        y = self.fc2(self.act(self.fc1(self.gather(x))))
        return x * nn.functional.interpolate(y, size=x.shape[2:]).sigmoid()

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) != self.feat_size:
            raise ValueError(f"The input must be of feat_size {self.feat_size}, got {(height, width)}.")


def _log2(name: str, value: int) -> int:
    number = positive_int(name, value)
    if number < 2 or number & (number - 1):
        raise ValueError(f"{name} must be a power of two from 2 on, got {value!r}.")
    return number.bit_length() - 1

"""timm's Gather-Excite, constructed as its source means it.

The constructor of timm 1.0.31 spreads `device` and `dtype` as positional arguments (`*dd` for `**dd`) and fails with
its defaults, and with every choice of arguments that has weights. What it makes is otherwise as timm has it: the
names of the weights are timm's, and the forward computes what timm's does, in words that TorchScript knows.
"""

import math
from collections.abc import Callable

import torch
from timm.layers import ConvMlp, create_conv2d, make_divisible
from timm.layers import GatherExcite as TimmGatherExcite
from torch import nn

from .checks import activation as checked_activation
from .registry import register_attn

__all__ = ["GatherExcite"]


@register_attn("ge")
class GatherExcite(TimmGatherExcite):
    """out = x * gate(interpolate(MLP(gather(x)))).

    Paper: Gather-Excite: Exploiting Feature Context in CNNs, NeurIPS 2018, https://arxiv.org/abs/1810.12348

    Args:
        channels: Number of channels C of the input.
        feat_size: Height and width of the input; needed for a learned gather of global extent.
        extra_params: Gather by depthwise convolutions instead of by average pooling.
        extent: Extent of the gather, a power of two; 0 is global.
        use_mlp: Whether a bottleneck of two 1x1 convolutions follows the gather.
        rd_ratio: Width of that bottleneck as a part of the channels.
        rd_channels: Width of that bottleneck, instead of the ratio.
        rd_divisor: What its width is a multiple of.
        add_maxpool: Gather by the mean of average and maximum pooling.
        act_layer: Activation, by class or timm's name.
        norm_layer: Whether norms follow the depthwise convolutions; None: no.
        gate_layer: Gate, by class or timm's name.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W).

    Raises:
        ValueError: If the extent is neither 0 nor a power of two, a learned global gather has no feat_size, or
            act_layer or gate_layer is no activation.
    """

    def __init__(
        self,
        channels: int,
        feat_size: int | tuple[int, int] | None = None,
        extra_params: bool = False,
        extent: int = 0,
        use_mlp: bool = True,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 1,
        add_maxpool: bool = False,
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        gate_layer: str | type[nn.Module] = "sigmoid",
        device=None,
        dtype=None,
    ):
        _check(extent, extra_params, feat_size)
        gate_layer = checked_activation("gate_layer", gate_layer)
        super().__init__(channels, extent=extent, use_mlp=False, add_maxpool=add_maxpool, gate_layer=gate_layer)
        placed = {"device": device, "dtype": dtype}
        activation = checked_activation("act_layer", act_layer)
        gate = self.gate
        del self.mlp, self.gate  # registered anew in timm's order: the order of parameters is that of optimizer states
        if extra_params:
            sizes = [feat_size] if extent == 0 else [3] * int(math.log2(extent))
            self.gather = _gather(channels, sizes, 1 if extent == 0 else 2, activation, norm_layer, placed)
        hidden = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
        self.mlp = ConvMlp(channels, hidden, act_layer=activation, **placed) if use_mlp else nn.Identity()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(self._gathered(x))
        if y.shape[2] != 1 or y.shape[3] != 1:
            y = nn.functional.interpolate(y, size=x.shape[2:])
        return x * self.gate(y)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        if self.gather is not None:
            return self.gather(x)
        if self.extent == 0:
            mean = x.mean((2, 3), keepdim=True)
        else:
            mean = nn.functional.avg_pool2d(x, self.gk, self.gs, self.gk // 2, count_include_pad=False)
        return 0.5 * mean + 0.5 * self._largest(x) if self.add_maxpool else mean

    def _largest(self, x: torch.Tensor) -> torch.Tensor:
        if self.extent == 0:
            return x.amax((2, 3), keepdim=True)
        return nn.functional.max_pool2d(x, self.gk, self.gs, self.gk // 2)


def _check(extent: int, extra_params: bool, feat_size: object) -> None:
    if isinstance(extent, bool) or not isinstance(extent, int) or extent < 0 or extent & (extent - 1) or extent == 1:
        raise ValueError(f"extent must be 0 (global) or a power of two from 2 on, got {extent!r}.")
    if extra_params and extent == 0 and feat_size is None:
        raise ValueError("extra_params=True with extent=0 needs feat_size, the height and width of the input.")


def _gather(channels, sizes, stride, activation, norm_layer, placed) -> nn.Sequential:
    gather = nn.Sequential()
    for number, size in enumerate(sizes, 1):
        conv = create_conv2d(channels, channels, kernel_size=size, stride=stride, depthwise=True, **placed)
        gather.add_module(f"conv{number}", conv)
        if norm_layer:
            gather.add_module(f"norm{number}", nn.BatchNorm2d(channels, **placed))
        if number != len(sizes):
            gather.add_module(f"act{number}", activation(inplace=True))
    return gather

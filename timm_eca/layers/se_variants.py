"""Squeeze-and-excitation without dimensionality reduction: the ECA-Net paper's SE-Var1 to 3 and SE-GC.

Paper: ECA-Net, CVPR 2020, https://arxiv.org/abs/1910.03151, Eq. 3 to 5 and Table 2. All are one C x C matrix on the
pooled features: the identity, a diagonal, a full one, and one of blocks on the diagonal.
"""

import torch
from torch import nn

from .channel_gate import ChannelGate
from .checks import positive_int
from .registry import register_attn

__all__ = ["SeGroups", "SeVar1", "SeVar2", "SeVar3"]


@register_attn("se_var1")
class SeVar1(ChannelGate):
    """SE-Var1: the pooled features are the logits. No parameters.

    Args:
        channels: Number of channels C of the input.
        device: Unused, as dtype, and accepted because timm passes both to every layer.
        dtype: Unused.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        positive_int("channels", channels)

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return y


@register_attn("se_var2")
class SeVar2(ChannelGate):
    """SE-Var2: logits w * y, a diagonal matrix of C weights (Eq. 4), starting uniform in [-1, 1].

    That is PyTorch's start of a linear map with one input, which each channel's weight is.

    Args:
        channels: Number of channels C of the input.
        device: Device of the weights.
        dtype: Data type of the weights.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        channels = positive_int("channels", channels)
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype).uniform_(-1, 1))

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.weight


@register_attn("se_var3")
class SeVar3(ChannelGate):
    """SE-Var3: logits W y with a full matrix of C^2 weights (Eq. 4).

    Args:
        channels: Number of channels C of the input.
        device: Device of the weights.
        dtype: Data type of the weights.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        channels = positive_int("channels", channels)
        self.fc = nn.Linear(channels, channels, bias=False, device=device, dtype=dtype)

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return self.fc(y)


class SeGroups(ChannelGate):
    """SE-GC: logits W_G y, a matrix of G blocks on the diagonal with C^2 / G weights in all (Eq. 5).

    Args:
        channels: Number of channels C of the input.
        groups: G, the number of blocks.
        group_size: Width of a block, C / G, in place of groups.
        device: Device of the weights.
        dtype: Data type of the weights.

    Raises:
        ValueError: If not exactly one of groups and group_size is given, or it does not divide channels.
    """

    def __init__(
        self, channels: int, groups: int | None = None, group_size: int | None = None, device=None, dtype=None
    ):
        super().__init__()
        channels = positive_int("channels", channels)
        if (groups is None) == (group_size is None):
            raise ValueError(f"SE-GC needs groups or group_size, got groups={groups!r}, group_size={group_size!r}.")
        name, value = ("groups", groups) if group_size is None else ("group_size", group_size)
        divisor = positive_int(name, value)  # type: ignore[arg-type]
        if channels % divisor:
            raise ValueError(f"{name} must divide channels, {channels}, got {divisor}.")
        count = divisor if group_size is None else channels // divisor
        self.conv = nn.Conv1d(channels, channels, 1, groups=count, bias=False, device=device, dtype=dtype)

    def logits(self, y: torch.Tensor) -> torch.Tensor:
        return self.conv(y.unsqueeze(-1)).squeeze(-1)

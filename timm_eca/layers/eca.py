"""Efficient channel attention.

Paper: ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks, CVPR 2020,
https://arxiv.org/abs/1910.03151. Reference code: https://github.com/BangguWu/ECANet (MIT).
"""

import math

import torch
from timm.layers import EcaModule, LayerType
from torch import nn

from .checks import activation, finite, odd_kernel_size, positive_int
from .registry import register_attn

__all__ = ["EcaLayer", "adaptive_kernel_size", "chosen_kernel_size"]


def adaptive_kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """Return the kernel size psi(C) = |log2(C) / gamma + beta / gamma|_odd of Eq. 12.

    |t|_odd is the odd number nearest to t, computed as in the paper's Figure 3: the integer part, plus one
    where that is even. The result is at least 3, as in timm: a kernel of one mixes no channels. This floor
    departs from the paper's formula below 8 channels only.

    Args:
        channels: Number of channels C, at least 1.
        gamma: Slope of the mapping, above 0.
        beta: Offset of the mapping.

    Raises:
        ValueError: If channels is not a positive integer, gamma or beta not a finite number, or gamma not above zero.
    """
    channels = positive_int("channels", channels)
    beta = finite("beta", beta)
    if not finite("gamma", gamma) > 0:
        raise ValueError(f"gamma must be above 0, got {gamma!r}.")
    t = int(abs((math.log2(channels) + beta) / gamma))
    return max(t if t % 2 else t + 1, 3)


def chosen_kernel_size(channels: int | None, kernel_size: int | None, gamma: float = 2, beta: float = 1) -> int:
    """Return the kernel size given, or the adaptive one of the channels where it is None.

    Raises:
        ValueError: If neither is given, or kernel_size is not an odd positive integer.
    """
    if kernel_size is not None:
        return odd_kernel_size(kernel_size, accepted=" or None for the adaptive size")
    if channels is None:
        raise ValueError("EcaLayer needs channels (for the adaptive kernel size) or kernel_size, got neither.")
    return adaptive_kernel_size(channels, gamma, beta)


@register_attn("eca")
class EcaLayer(nn.Module):
    """Efficient channel attention: out = x * sigmoid(conv1d_k(mean over H, W of x)), Eq. 9.

    One convolution over the channel axis, k weights, no bias, zero padding (k - 1) / 2. Its state dict holds
    exactly `conv.weight` of shape (1, 1, k), as timm's ECA checkpoints do.

    Args:
        channels: Number of channels C of the input; needed for the adaptive kernel size only.
        kernel_size: Odd kernel size k. None: `adaptive_kernel_size(channels, gamma, beta)`.
        gamma: Slope of the adaptive kernel size, Eq. 12.
        beta: Offset of the adaptive kernel size, Eq. 12.
        gate_layer: Gate applied to the convolved channel descriptor.
        act_layer: Unused without use_mlp, accepted because timm passes it to every layer in this place.
        rd_ratio: Unused, as act_layer: ECA reduces no dimensions.
        rd_channels: Unused, as rd_ratio.
        rd_divisor: Unused, as rd_ratio.
        bias: Unused, as act_layer: ECA has no bias.
        use_mlp: Make timm's `EcaModule` instead, with its two convolutions; needs channels and sizes itself by them.
        device: Device of the weights.
        dtype: Data type of the weights.

    Shape:
        input (B, C, H, W), output (B, C, H, W) in the memory format of the input.

    Raises:
        ValueError: If neither channels nor kernel_size is given, kernel_size is not an odd positive integer, channels
            not a positive integer or gamma not positive, or gate_layer is no activation.
    """

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        gate_layer: LayerType = "sigmoid",
        act_layer: LayerType | None = None,
        rd_ratio: float = 1 / 8,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        bias: bool = False,
        use_mlp: bool = False,
        device=None,
        dtype=None,
    ):
        if use_mlp:  # what timm's name makes of the argument; as another class, nothing takes it for the paper's layer
            self.__class__ = EcaModule  # type: ignore[assignment]
            args = (gamma, beta, act_layer, gate_layer, rd_ratio, rd_channels, rd_divisor, True, device, dtype)
            EcaModule.__init__(self, positive_int("channels", channels), 3, *args)  # type: ignore[arg-type]
            return
        super().__init__()
        if channels is not None:
            channels = positive_int("channels", channels)
        kernel_size = chosen_kernel_size(channels, kernel_size, gamma, beta)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype)
        self.gate = activation("gate_layer", gate_layer)()

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gates, one per sample and channel: (B, C, H, W) -> (B, C)."""
        y = x.mean((2, 3))
        y = self.conv(y.unsqueeze(1)).squeeze(1)
        return self.gate(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.channel_weights(x)[:, :, None, None]

    @torch.jit.ignore
    def identity_init_(self) -> float:
        """Zero the kernel, so that the gate is one constant, and return the factor that undoes it.

        A zero kernel gates every channel by gate(0), 0.5 for the sigmoid. Where what comes in is multiplied by
        the returned factor, 2, the layer changes nothing: multiplying by powers of two is exact. The kernel's
        gradient is not zero there, so training moves it from the first step on.

        Raises:
            ValueError: If gate(0) is not a power of two that can be undone exactly.
        """
        constant = float(self.gate(torch.zeros((), device="cpu")))
        if constant <= 0 or math.frexp(constant)[0] != 0.5:
            raise ValueError(
                f"An identity start needs a gate whose value at zero is a power of two, as sigmoid's 0.5;"
                f" {type(self.gate).__name__} gives {constant:g}."
            )
        with torch.no_grad():
            self.conv.weight.zero_()
        return 1 / constant

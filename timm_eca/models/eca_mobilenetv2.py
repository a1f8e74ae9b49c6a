"""ECA-MobileNetV2 as released with the paper: the layer ends each of the 17 inverted residuals.

Kernel sizes: code of https://github.com/BangguWu/ECANet (MIT), 1 below 96 channels and 3 from there on. The width
that counts is the unscaled one, so that all width multipliers share one preset.
"""

from functools import partial

from timm.models import generate_default_cfgs
from torch import nn

from ._factory import create_eca, eca_cfg

__all__ = ["eca_mobilenetv2_050", "eca_mobilenetv2_100", "eca_mobilenetv2_140"]

STAGE_WIDTHS = (16, 24, 32, 64, 96, 160, 320)
KERNEL_SIZES = tuple(1 if width < 96 else 3 for width in STAGE_WIDTHS)

_cfg = partial(eca_cfg, first_conv="conv_stem", classifier="classifier")

default_cfgs = generate_default_cfgs(
    {**_cfg("eca_mobilenetv2_050"), **_cfg("eca_mobilenetv2_100"), **_cfg("eca_mobilenetv2_140")}
)

_eca_mobilenetv2 = partial(create_eca, preset=KERNEL_SIZES, stages=range(1, len(STAGE_WIDTHS) + 1))


def eca_mobilenetv2_050(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-MobileNetV2, width multiplier 0.5."""
    return _eca_mobilenetv2("eca_mobilenetv2_050", "mobilenetv2_050", pretrained=pretrained, **kwargs)


def eca_mobilenetv2_100(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-MobileNetV2, width multiplier 1.0."""
    return _eca_mobilenetv2("eca_mobilenetv2_100", "mobilenetv2_100", pretrained=pretrained, **kwargs)


def eca_mobilenetv2_140(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-MobileNetV2, width multiplier 1.4."""
    return _eca_mobilenetv2("eca_mobilenetv2_140", "mobilenetv2_140", pretrained=pretrained, **kwargs)

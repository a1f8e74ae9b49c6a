"""ECA-ResNet as released with the paper: one kernel size per stage, every norm's weight starting at 1.

Kernel sizes: README and code of https://github.com/BangguWu/ECANet (MIT).
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import nn

from ._factory import create_eca, eca_cfg

__all__ = ["eca_resnet18", "eca_resnet34", "eca_resnet50", "eca_resnet101", "eca_resnet152"]

KERNEL_SIZES = {
    "eca_resnet18": (3, 5, 7, 7),
    "eca_resnet34": (3, 3, 5, 7),
    "eca_resnet50": (3, 5, 5, 7),
    "eca_resnet101": (3, 3, 5, 7),
    "eca_resnet152": (3, 3, 5, 7),
}

_cfg = partial(eca_cfg, first_conv="conv1", classifier="fc")

default_cfgs = generate_default_cfgs({k: v for name in KERNEL_SIZES for k, v in _cfg(name).items()})


def _eca_resnet(name: str, backbone: str, **kwargs: Any) -> nn.Module:
    return create_eca(name, backbone, KERNEL_SIZES[name], stages=range(1, 5), **{"zero_init_last": False, **kwargs})


def eca_resnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNet-18."""
    return _eca_resnet("eca_resnet18", "resnet18", pretrained=pretrained, **kwargs)


def eca_resnet34(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNet-34."""
    return _eca_resnet("eca_resnet34", "resnet34", pretrained=pretrained, **kwargs)


def eca_resnet50(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNet-50."""
    return _eca_resnet("eca_resnet50", "resnet50", pretrained=pretrained, **kwargs)


def eca_resnet101(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNet-101."""
    return _eca_resnet("eca_resnet101", "resnet101", pretrained=pretrained, **kwargs)


def eca_resnet152(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNet-152."""
    return _eca_resnet("eca_resnet152", "resnet152", pretrained=pretrained, **kwargs)

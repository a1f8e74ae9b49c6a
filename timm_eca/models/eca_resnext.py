"""ECA-ResNeXt: future work of the paper, which released none; the kernel sizes are the adaptive ones of Eq. 12."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from torch import nn

from ._factory import create_eca, eca_cfg

__all__ = ["eca_resnext50_32x4d", "eca_resnext101_32x8d"]

_cfg = partial(eca_cfg, first_conv="conv1", classifier="fc")

default_cfgs = generate_default_cfgs({**_cfg("eca_resnext50_32x4d"), **_cfg("eca_resnext101_32x8d")})


def _eca_resnext(name: str, backbone: str, **kwargs: Any) -> nn.Module:
    return create_eca(name, backbone, "adaptive", stages=range(1, 5), **{"zero_init_last": False, **kwargs})


def eca_resnext50_32x4d(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNeXt-50 32x4d."""
    return _eca_resnext("eca_resnext50_32x4d", "resnext50_32x4d", pretrained=pretrained, **kwargs)


def eca_resnext101_32x8d(pretrained: bool = False, **kwargs) -> nn.Module:
    """ECA-ResNeXt-101 32x8d."""
    return _eca_resnext("eca_resnext101_32x8d", "resnext101_32x8d", pretrained=pretrained, **kwargs)

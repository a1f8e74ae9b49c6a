"""The networks that are compared: a backbone plain, with this package's ECA, and with timm's ECA, SE and CBAM."""

from collections.abc import Callable

import timm
from timm.layers import EcaModule
from torch import nn

import timm_eca  # noqa: F401  its layers by name

__all__ = ["SYSTEMS", "create"]

SYSTEMS: dict[str, dict[str, object]] = {
    "plain": {},
    "eca": {"attn_layer": "eca"},
    "eca, plain path": {"attn_layer": "eca", "fused": False},
    "timm's eca": {"attn_layer": EcaModule, "fused": False},
    "se": {"attn_layer": "se"},
    "cbam": {"attn_layer": "cbam"},
}
"""Arguments of `timm.create_model`. All but the first sit at the same place, the end of each residual branch."""


def create(backbone: str, system: str, **kwargs: object) -> nn.Module:
    """Return a backbone with one of the systems."""
    build: Callable[..., nn.Module] = timm.create_model
    return build(backbone, **SYSTEMS[system], **kwargs)

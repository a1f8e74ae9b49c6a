"""Every backbone of the paper with every system it compares, in one grid."""

import functools
from typing import Any, NamedTuple

from torch import nn

from ..inject import add_attn_
from .counting import Count, count
from .systems import eca, plain

__all__ = ["GRID_BACKBONES", "GRID_METHODS", "Cell", "grid"]

GRID_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenetv2_100")

GRID_METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "none": None,
    "SE": ("se_paper", {}),
    "CBAM": ("cbam", {}),
    "A2": ("a2", {}),
    "GC": ("gc", {"fuse_add": True, "fuse_scale": False, "rd_ratio": 1 / 16}),
    "GSoP": ("gsop", {}),
    "AA": ("aa", {}),
    "ECA": None,
}
"""Layer and arguments of a method; each goes into every block, where `attn_layer=` puts it. ECA's are the released."""


class Cell(NamedTuple):
    """One backbone with one method, and what it costs."""

    backbone: str
    method: str
    cost: Count


@functools.cache
def grid() -> list[Cell]:
    """Count all pairs of `GRID_BACKBONES` and `GRID_METHODS` at 224 x 224."""
    return [Cell(b, m, count(_build(b, m))) for b in GRID_BACKBONES for m in GRID_METHODS]


def _build(backbone: str, method: str) -> nn.Module:
    chosen = GRID_METHODS[method]
    if chosen is None:
        return eca(backbone) if method == "ECA" else plain(backbone)
    layer, kwargs = chosen
    if method == "SE" and backbone.startswith("mobilenet"):
        kwargs = {"reduction": 8}
    return add_attn_(plain(backbone), layer, attn_kwargs=kwargs)

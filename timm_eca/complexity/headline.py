"""The paper's headline, 80 parameters and 4.7e-4 GFLOPs on ResNet-50, counted in every way known to us."""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from ..inject import attn_modules
from ..paper import UNITS, paper_tables
from .counting import count
from .systems import eca, plain

__all__ = ["HEADLINE_UNITS", "HeadlineCount", "as_printed", "headline"]

HEADLINE_UNITS = ("2^30", "10^9")
"""What a GFLOP may be: the paper's own tables divide by 2^30, and what it copied from other papers is decimal."""


class HeadlineCount(NamedTuple):
    """What one way of counting gives for all ECA modules of the headline's backbone together."""

    label: str
    operations: float

    def gflops(self, unit: str) -> float:
        """Return the operations in a unit of `HEADLINE_UNITS`."""
        return self.operations / UNITS[unit]

    def agrees(self, unit: str) -> bool:
        """Whether a unit of `HEADLINE_UNITS` makes it the headline's figure, to its two digits."""
        return as_printed(self.gflops(unit)) == as_printed(float(paper_tables()["headline"]["gflops"]))


def as_printed(gflops: float) -> str:
    """Return a number with two digits, as the headline has it."""
    return f"{gflops:.1e}"


@functools.cache
def headline() -> tuple[int, list[HeadlineCount]]:
    """Return the parameters, and the operations by every way of counting them that was tried.

    With k the kernel size, and C channels of H x W elements in a module, sums run over the modules.
    """
    backbone = paper_tables()["headline"]["backbone"]
    model: Any = eca(backbone)
    layers = [(layer, site.channels, 56 // 2 ** (site.stage - 1)) for layer, site in _layers(model)]
    convolutions = count(model).operations["thop"] - count(plain(backbone)).operations["thop"]
    pooling = sum(_pooling(channels, side) for _, channels, side in layers)
    gates = sum(channels for _, channels, _ in layers)
    elements = sum(channels * side**2 for _, channels, side in layers)
    squares = sum(channels * layer.conv.kernel_size[0] ** 2 for layer, channels, _ in layers)
    sides = sum(channels * (side + side + 1) for _, channels, side in layers)
    parameters = sum(p.numel() for layer, _, _ in layers for p in layer.parameters())
    return parameters, [
        HeadlineCount("the 1-D convolutions, k C", convolutions),
        HeadlineCount("these and each gate's sigmoid, k C + C", convolutions + gates),
        HeadlineCount("convolutions and global pooling, as thop counts, k C + (H W + 1) C", convolutions + pooling),
        HeadlineCount("these and the multiplication by the gates, H W C", convolutions + pooling + elements),
        HeadlineCount("convolutions as if they were 2-D, k^2 C", squares),
        HeadlineCount("thop's pooling with the window's sides added, not multiplied, (H + W + 1) C", sides),
    ]


def _layers(model: Any) -> list[tuple[Any, Any]]:
    return list(zip(attn_modules(model).values(), model.attn_sites))


def _pooling(channels: int, side: int) -> float:
    from thop import profile

    image = torch.empty(1, channels, side, side, device="meta")
    return profile(nn.AdaptiveAvgPool2d(1), (image,), verbose=False)[0]

"""The paper's headline, 80 parameters and 4.7e-4 GFLOPs on ResNet-50, counted in every way known to us."""

import functools
from typing import Any, NamedTuple

from ..inject import attn_modules
from ..paper import paper_tables
from .counting import count
from .systems import eca, plain

__all__ = ["HeadlineCount", "headline"]


class HeadlineCount(NamedTuple):
    """What one way of counting gives for all ECA modules of the headline's backbone together."""

    label: str
    operations: float

    @property
    def gflops(self) -> float:
        """Operations in 2^30, the paper's unit."""
        return self.operations / 2**30


@functools.cache
def headline() -> tuple[int, list[HeadlineCount]]:
    """Return the parameters, and the multiply-adds by four ways of counting, each including the one before."""
    backbone = paper_tables()["headline"]["backbone"]
    model: Any = eca(backbone)
    layers = attn_modules(model)
    convolutions = count(model).operations["thop"] - count(plain(backbone)).operations["thop"]
    gates = sum(site.channels for site in model.attn_sites)
    elements = sum(site.channels * (56 // 2 ** (site.stage - 1)) ** 2 for site in model.attn_sites)
    parameters = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    return parameters, [
        HeadlineCount("the 1-D convolutions", convolutions),
        HeadlineCount("with one operation for each gate's sigmoid", convolutions + gates),
        HeadlineCount(
            "with global pooling, H W additions and a division for each channel", convolutions + 2 * gates + elements
        ),
        HeadlineCount("with the multiplication of each element by its gate", convolutions + 2 * gates + 2 * elements),
    ]

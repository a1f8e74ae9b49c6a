"""The identity start: a model with attention that computes, bit for bit, what it computes without.

A layer whose gates are all one constant, 0.5 for a sigmoid at zero, is undone by multiplying what it gates by 2, which
is exact. The factor goes into weights that scale the branch, most often those of its last norm: what results is an
ordinary network with attention. Where no weights do, the block holds the factor in a buffer of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .sites import Site
from .spec import AttnSpec

__all__ = ["check_identity", "identity_factors", "scale_"]


def check_identity(sites: Iterable[Site]) -> None:
    """Raise ValueError if an identity start is impossible at any of the sites."""
    for site in sites:
        if site.replaces or site.removes:
            raise ValueError(
                "attn_init='identity' keeps what the model computes, but at"
                f" {site.removes[0] if site.removes else site.path} squeeze-and-excitation"
                f" ({site.replaces or 'inside the branch'}) would go. Use attn_where='add', which keeps it, or"
                " attn_init='default'."
            )
        if site.gain is None and not site.scales:
            raise ValueError(
                f"attn_init='identity' needs norm weights that scale what {site.path} gates; there are none before it."
                " Use attn_init='default'."
            )


def identity_factors(spec: AttnSpec, layers: Sequence[Any]) -> list[float]:
    """Bring new layers to the start their spec asks for and return what their inputs are to be multiplied by.

    Raises:
        ValueError: If an identity start is asked for and the layer has none.
    """
    if spec.attn_init != "identity":
        return [1.0] * len(layers)
    if not all(hasattr(layer, "identity_init_") for layer in layers):
        raise ValueError(
            f"attn_init='identity' needs a layer with a method identity_init_(); {spec.name!r} has none, 'eca' has."
        )
    return [layer.identity_init_() for layer in layers]


@torch.no_grad()
def scale_(model: nn.Module, paths: Iterable[str], factor: float) -> None:
    """Multiply a model's tensors by a factor, divide those whose path begins with `/`."""
    for path in paths:
        owner, _, name = path.lstrip("/").rpartition(".")
        getattr(model.get_submodule(owner), name).mul_(1 / factor if path.startswith("/") else factor)

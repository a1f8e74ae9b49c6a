"""A batch norm and what is computed at once with it, by the compiled passes: a tail, or an activation inside a block.

It runs between two convolutions, where each line has its price (see eligible.py): few and plain lookups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import native
from .formula import Act, Norm, Running
from .tail import graph_norm, trained_tail

__all__ = ["GraphNorm", "InnerNorm", "NormPart", "compiled_norm"]


@dataclass(frozen=True, eq=False)  # no tuple: exporters walk through those that modules hold
class NormPart:
    """A batch norm, and the dictionaries of its weights and statistics: each call looks, for they may be replaced."""

    module: Any
    frozen: bool
    affine: dict[str, Any]
    stats: dict[str, Any]

    @property
    def of_batch(self) -> bool:
        """Whether the batch's statistics are used, as `torch.nn.BatchNorm2d` decides it."""
        stats = self.stats
        none = stats["running_mean"] is None and stats["running_var"] is None
        return not self.frozen and (self.module.training or none)

    @property
    def is_whole(self) -> bool:
        """Whether both statistics are there, or none: batch norm has its own error for one of them."""
        return (self.stats["running_mean"] is None) == (self.stats["running_var"] is None)

    def keeps_type(self, z: Tensor) -> bool:
        """Whether a map has the type of what the norm makes of it: a frozen one promotes to that of its statistics."""
        return not self.frozen or torch.promote_types(z.dtype, self.stats["running_mean"].dtype) == z.dtype

    def given(self) -> Norm:
        """Return the norm by its own statistics."""
        affine, stats = self.affine, self.stats
        return Norm(affine["weight"], affine["bias"], stats["running_mean"], stats["running_var"], self.module.eps)

    def running(self) -> Running | None:
        """Return the statistics that a batch's update, as `torch.nn.BatchNorm2d` decides it."""
        norm: Any = self.module
        if not (norm.training and norm.track_running_stats):
            return None
        stats = norm._buffers
        if stats["running_mean"] is None:
            return None
        return Running(stats["running_mean"], stats["running_var"], norm.momentum, stats["num_batches_tracked"])


@dataclass(frozen=True, eq=False)
class InnerNorm:
    """A norm and its activation before a block's last convolution.

    Attributes:
        norm: The norm.
        act: The activation.
        modules: What is computed at once, in its order.
    """

    norm: NormPart
    act: Act
    modules: tuple[nn.Module, ...]

    def __call__(self, z: Tensor) -> Tensor:
        """Return what the modules make of a convolution's map, which is overwritten if no gradient is asked for."""
        out = compiled_norm(self.norm, None, z, None, None, self.act) if type(z) is Tensor else None
        return self.in_turn(z) if out is None else out

    def in_turn(self, z: Tensor) -> Tensor:
        """The same, one module after the other."""
        for module in self.modules:
            z = module(z)
        return z


class GraphNorm(InnerNorm):
    """As `InnerNorm`, for a graph."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return what the modules make of a convolution's map, which may be overwritten if no gradient is asked for."""
        given = not (torch.is_grad_enabled() or self.norm.of_batch)
        out = graph_norm(z, self.norm.given(), self.act) if given else None
        return self.in_turn(z) if out is None else out


def compiled_norm(
    norm: NormPart, kernel: Tensor | None, z: Tensor, added: Tensor | None, pooled: Tensor | None, act: int
) -> Tensor | None:
    """Return what the compiled passes make of a map, None where they do not take it.

    Args:
        norm: The norm that the map goes through.
        kernel: ECA's kernel, None where there is no attention.
        z: The map.
        added: What is added, of z's shape, or None.
        pooled: z's mean over the map, None where it is not known yet.
        act: The `Act` that ends it.
    """
    affine, stats, eps = norm.affine, norm.stats, norm.module.eps
    weight, bias = affine["weight"], affine["bias"]
    if norm.frozen and not norm.keeps_type(z):
        return None
    if norm.of_batch:
        return trained_tail((z, added, weight, bias, kernel), (None, None), norm.running(), eps, act)
    mean, var = stats["running_mean"], stats["running_var"]
    if torch.is_grad_enabled():
        return trained_tail((z, added, weight, bias, kernel), (mean, var), None, eps, act)
    return z if native.infer(z, added, (weight, bias, kernel, mean, var, None), pooled, None, eps, act) else None

"""What a fused block computes: timm's own forward up to its last convolution, and the rest at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .eligible import Parts, map_fits
from .formula import Act, Moments, Norm, TailWeights
from .norms import compiled_norm
from .pooled import PoolOf, SummedNorm, pooled_before
from .tail import fused_tail, graph_tail

__all__ = ["compiled_tail", "eager_tail", "fused_forward"]

TailOf = Callable[[Parts, Tensor, Tensor, Tensor | None], Tensor | None]


def fused_forward(block: Any, parts: Parts, x: Tensor, tail_of: TailOf, pool_of: PoolOf) -> Tensor:
    """Compute a block's forward with its tail at once, where its maps allow that.

    Args:
        block: A fused block.
        parts: The modules of its tail.
        x: Its input.
        tail_of: What computes the tail: `eager_tail`, or in a graph `compiled_tail`.
        pool_of: What the norm before the last convolution sums its map by: `compiled_pool`, or in a graph `graph_pool`.
    """
    halves, pooled = block._halves, None
    given = not (torch.is_grad_enabled() or parts.norm.of_batch)
    if parts.norms and parts.sums and given:
        summed = SummedNorm(parts.norms[-1], parts.conv, pool_of)
        u, shortcut = halves.normed_head(block, x, (*parts.norms[:-1], summed))
        pooled = summed.pooled
    else:
        u, shortcut = halves.normed_head(block, x, parts.norms) if parts.norms else halves.head(block, x)
    if pooled is None and parts.pools and given:
        pooled = pooled_before(parts.conv, u)
    z = parts.conv(u)
    out = tail_of(parts, z, shortcut, pooled)
    return halves.tail(block, z, shortcut) if out is None else out


def eager_tail(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> Tensor | None:
    """Return what a tail makes of the last convolution's map, None where that or the shortcut does not fit."""
    out = None
    if parts.short and not (parts.drop_path is not None and _drops(parts)):
        added = shortcut if parts.adds else None
        out = compiled_norm(parts.norm, parts.kernel["weight"], z, added, pooled, parts.relu)
    if out is None and _fits(parts, z, shortcut):
        out = fused_tail(z, *_operands(parts, z, shortcut, pooled), parts.relu)
    return out if out is None or parts.relu or parts.act is None else parts.act(out)


def compiled_tail(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> Tensor | None:
    """As `eager_tail`, in what `torch.compile` takes into one graph."""
    if not _maps_fit(parts, z, shortcut):
        return None
    out = graph_tail(z, *_operands(parts, z, shortcut, pooled), parts.relu)
    return out if parts.relu or parts.act is None else parts.act(out)


def _fits(parts: Parts, z: Tensor, shortcut: Tensor) -> bool:
    """Whether the tail can be computed of a map and the shortcut, by weights that have no operations of their own."""
    affine, stats = parts.norm.affine, parts.norm.stats
    weights = (affine["weight"], affine["bias"], parts.kernel["weight"], stats["running_mean"], stats["running_var"])
    return native.are_plain(weights) and _maps_fit(parts, z, shortcut)


def _maps_fit(parts: Parts, z: Tensor, shortcut: Tensor) -> bool:
    """Whether it can of a map, and of the shortcut if that is added as it is."""
    if not (map_fits(z, parts.norm.of_batch) and parts.norm.is_whole and parts.norm.keeps_type(z)):
        return False
    as_it_is = parts.adds and parts.downsample is None
    return not as_it_is or (z.shape == shortcut.shape and z.dtype == shortcut.dtype)


def _operands(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> tuple[Tensor | None, TailWeights]:
    """Return what a tail adds to z, and what it computes with besides."""
    weights = _weights(parts, z, pooled)  # draws what is dropped, before a downsample that draws too
    if parts.downsample is None:
        return shortcut if parts.adds else None, weights
    added, norm = _downsampled(parts, shortcut)
    return added.to(z.dtype), weights._replace(shortcut_norm=norm)


def _downsampled(parts: Parts, x: Tensor) -> tuple[Tensor, Norm | None]:
    """Return the shortcut, and in inference the norm that it has yet to go through, which the tail does on its way."""
    norm = parts.shortcut_norm
    if norm is None:
        return parts.downsample(x), None
    *before, last = parts.downsample
    for layer in before:
        x = layer(x)
    if not (torch.is_grad_enabled() or norm.of_batch) and norm.keeps_type(x):
        given = norm.given()
        if native.are_plain(given[:4]):
            return x, given
    # Where a gradient is recorded, x is not overwritten, which somebody may have got hold of.
    out = None
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        out = compiled_norm(norm, None, x, None, None, Act.NONE)
    return last(x) if out is None else out, None


def _weights(parts: Parts, z: Tensor, pooled: Tensor | None) -> TailWeights:
    norm, affine, stats = parts.norm, parts.norm.affine, parts.norm.stats
    drop = moments = running = None
    if _drops(parts):
        drop = parts.drop_path(z.new_ones((len(z), 1, 1, 1))).flatten(1)  # the same draw as over the map
    if norm.of_batch:
        running = norm.running()
    else:
        moments = Moments(stats["running_mean"], stats["running_var"])
    kernel, weight, bias = parts.kernel["weight"], affine["weight"], affine["bias"]
    return TailWeights(kernel, parts.gate, weight, bias, moments, running, drop, norm.module.eps, None, pooled)


def _drops(parts: Parts) -> bool:
    return parts.drop_path is not None and parts.adds and parts.drop_path.training

"""What a fused block computes: timm's own forward up to its last convolution, and the rest at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .eligible import Parts, map_fits
from .formula import Moments, Norm, Running, TailWeights
from .known import CLASSES, Known, Tensors
from .pooled import pooled_before
from .tail import engine_of, fused_tail, graph_tail

__all__ = ["compiled_tail", "eager_tail", "fused_forward", "mean_before"]


def fused_forward(block: Any, parts: Parts, x: Tensor, tail_of: Callable[..., Tensor | None]) -> Tensor:
    """Compute a block's forward with its tail at once, where its maps allow that.

    Args:
        block: A fused block.
        parts: The modules of its tail.
        x: Its input.
        tail_of: What computes the tail: `eager_tail`, or in a graph `compiled_tail`.
    """
    u, shortcut = block._halves.head(block, x)
    pooled = mean_before(parts, u) if parts.pools else None
    z = parts.conv(u)
    out = tail_of(parts, z, shortcut, pooled)
    return block._halves.tail(block, z, shortcut) if out is None else out


def mean_before(parts: Parts, u: Tensor) -> Tensor | None:
    """Return the mean of the map that the last convolution is about to make, where it is known by then."""
    return None if torch.is_grad_enabled() or parts.norm.of_batch else pooled_before(parts.conv, u)


def eager_tail(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> Tensor | None:
    """Return what a tail makes of the last convolution's map, None where that or the shortcut does not fit."""
    mode = torch.is_grad_enabled(), parts.norm.of_batch
    known, tensors = parts.known.get(mode), _tensors(parts, z, shortcut, pooled)
    if known is not None and known.holds(tensors):
        return _acted(parts, _known_tail(parts, known, tensors))
    if not (_fits(parts, z, shortcut) and _are_plain(tensors)):
        return None
    added, weights = _operands(parts, z, shortcut, pooled)
    engine = engine_of(z, added, weights)
    if parts.downsample is None and (weights.moments or weights.running or parts.norm.stats["running_mean"] is None):
        infer = None if any(mode) or engine is not native else native.inference(tensors, parts.relu)
        parts.known[mode] = Known(tensors, engine, infer)
    return _acted(parts, fused_tail(z, added, weights, parts.relu, engine))


def compiled_tail(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> Tensor | None:
    """As `eager_tail`, in what `torch.compile` takes into one graph."""
    if not _fits(parts, z, shortcut):
        return None
    return _acted(parts, graph_tail(z, *_operands(parts, z, shortcut, pooled), parts.relu))


def _tensors(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> Tensors:
    """Return what the tail of a block without a downsample computes with."""
    affine, stats = parts.norm.affine, parts.norm.stats
    return (
        z,
        shortcut if parts.adds else None,
        affine["weight"],
        affine["bias"],
        parts.kernel["weight"],
        stats["running_mean"],
        stats["running_var"],
        pooled,
    )


def _known_tail(parts: Parts, known: Known, tensors: Any) -> Tensor:
    z, shortcut, *_, pooled = tensors
    if known.infer is None or _drops(parts):
        return fused_tail(z, shortcut, _weights(parts, z, pooled), parts.relu, known.engine)
    known.infer(tensors, parts.norm.module.eps)
    return z


def _acted(parts: Parts, out: Tensor) -> Tensor:
    return out if parts.relu or parts.act is None else parts.act(out)


def _fits(parts: Parts, z: Tensor, shortcut: Tensor) -> bool:
    """Whether the tail can be computed of a map, and of the shortcut if that is added as it is."""
    if not map_fits(z, parts.norm.of_batch):
        return False
    as_it_is = parts.adds and parts.downsample is None
    return not as_it_is or (z.shape == shortcut.shape and z.dtype == shortcut.dtype)


def _are_plain(tensors: Tensors) -> bool:
    return all(t is None or type(t) in CLASSES for t in tensors)


def _operands(parts: Parts, z: Tensor, shortcut: Tensor, pooled: Tensor | None) -> tuple[Tensor | None, TailWeights]:
    """Return what a tail adds to z, and what it computes with besides."""
    if parts.downsample is None:
        return shortcut if parts.adds else None, _weights(parts, z, pooled)
    added, norm = _downsampled(parts, shortcut)
    return added.to(z.dtype), _weights(parts, z, pooled)._replace(shortcut_norm=norm)


def _downsampled(parts: Parts, x: Tensor) -> tuple[Tensor, Norm | None]:
    """Return the shortcut, and in inference the norm that it has yet to go through, which the tail does on its way."""
    norm = parts.shortcut_norm
    if norm is None or torch.is_grad_enabled() or norm.of_batch:
        return parts.downsample(x), None
    for layer in list(parts.downsample)[:-1]:
        x = layer(x)
    return x, norm.given()


def _weights(parts: Parts, z: Tensor, pooled: Tensor | None) -> TailWeights:
    norm, affine, stats = parts.norm, parts.norm.affine, parts.norm.stats
    drop = moments = running = None
    if _drops(parts):
        drop = parts.drop_path(z.new_ones((len(z), 1, 1, 1))).flatten(1)  # the same draw as over the map
    if norm.of_batch:
        running = _running(norm.module)
    else:
        moments = Moments(stats["running_mean"], stats["running_var"])
    kernel, weight, bias = parts.kernel["weight"], affine["weight"], affine["bias"]
    return TailWeights(kernel, parts.gate, weight, bias, moments, running, drop, norm.module.eps, None, pooled)


def _drops(parts: Parts) -> bool:
    return parts.drop_path is not None and parts.adds and parts.drop_path.training


def _running(norm: Any) -> Running | None:
    """Return the statistics that batch norm updates, as `torch.nn.BatchNorm2d` decides it, and count the batch."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return None
    factor, count = norm.momentum, norm.num_batches_tracked
    if count is not None:
        count.add_(1)
        if factor is None and torch.compiler.is_compiling():  # a number would break the graph
            factor = 1 / count.to(norm.running_mean.dtype)
        elif factor is None:
            factor = 1 / float(count)
    return Running(norm.running_mean, norm.running_var, 0.0 if factor is None else factor)

"""A trial of a tail's passes on a device: they are to give what PyTorch's operations give in double precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import passes
from .formula import Moments, TailWeights, vector_dtype

__all__ = ["try_passes"]

Pass = Callable[..., Any]

# Sides of the maps, and whether they are normed by the batch's moments: rows that begin where 16 bytes do, and others.
_TRIALS = ((8, True), (7, False))
_SAMPLES, _CHANNELS = 2, 66


def try_passes(forward: Pass, backward: Pass, device: torch.device, dtype: torch.dtype, nhwc: bool) -> None:
    """Run passes on small maps, and compare all that they return.

    Args:
        forward: As `passes.forward`.
        backward: As `passes.backward`.
        device: Where the maps are.
        dtype: The maps' type.
        nhwc: Whether the maps are channels_last.

    Raises:
        AssertionError: If something is further off than half of the type's digits. Other errors are the passes' own.
    """
    layout = torch.channels_last if nhwc else torch.contiguous_format
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for side, of_batch in _TRIALS:
            maps = _random(3, _SAMPLES, _CHANNELS, side, side).to(device, dtype)
            doubles, own = ([t.contiguous(memory_format=layout) for t in m] for m in (maps.double(), maps))
            expected = _results(passes.forward, passes.backward, doubles, of_batch)
            _compare(_results(forward, backward, own, of_batch, expected[0]), expected, dtype)


def _results(
    forward: Pass, backward: Pass, maps: Sequence[Tensor], of_batch: bool, oracle: Any = None
) -> tuple[Any, list[Tensor]]:
    """Return what the passes make of z and the shortcut, and of the gradient.

    The gradient is of what an oracle made, if one is given: a ReLU of rounded values may cut at other places.
    """
    z, shortcut, grad = maps
    weights = _weights(of_batch, z)
    made = forward(z, shortcut, weights, True, False)
    out, pooled, moments = oracle or made
    pooled, *moments = (t.to(vector_dtype(z)) for t in (pooled, *moments))
    given = weights._replace(moments=Moments(*moments))
    return made, backward(grad, out.to(z.dtype), z, pooled, given, [True] * 5 + [of_batch])


def _weights(of_batch: bool, z: Tensor) -> TailWeights:
    weight, bias, mean, spread = _random(4, _CHANNELS).to(z.device, vector_dtype(z))
    moments = None if of_batch else Moments(mean, spread.square() + 0.5)
    kernel = _random(1, 1, 5).to(z.device, vector_dtype(z))
    return TailWeights(kernel, torch.sigmoid, weight, bias, moments, None, None, 1e-2)


def _random(*shape: int) -> Tensor:
    """Return the same numbers each time, and leave the generators that others use alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def _compare(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Compare tensors, and those in tuples and lists."""
    for own, true in zip(found, expected):
        if isinstance(true, Tensor):
            most = torch.finfo(dtype).eps ** 0.5 * float(true.abs().max())
            torch.testing.assert_close(own.double(), true, rtol=0, atol=most)
        else:
            _compare(own, true, dtype)

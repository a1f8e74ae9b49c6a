"""A trial of a tail's passes on a device: they are to give what PyTorch's operations give in double precision."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import passes
from .formula import Moments, Norm, TailWeights, vector_dtype

__all__ = ["try_passes"]

Pass = Callable[..., Any]


class _Trial(NamedTuple):
    """A tail: its map's shape, and whether it is normed by the batch's moments, adds a shortcut, ends in a ReLU."""

    shape: tuple[int, int, int, int]
    of_batch: bool
    adds: bool = True
    relu: bool = True


# Rows that begin where 16 bytes do, rows that do not, and rows of more than a program takes at a time.
_TRIALS = (_Trial((2, 66, 8, 8), True), _Trial((2, 66, 7, 7), False), _Trial((2, 3, 41, 40), True, False, False))


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
        for trial in _TRIALS:
            maps = _random(3, *trial.shape).to(device, dtype)
            doubles, own = ([t.contiguous(memory_format=layout) for t in m] for m in (maps.double(), maps))
            expected = _trained(passes.forward, passes.backward, doubles, trial)
            _compare(_trained(forward, backward, own, trial, expected[0]), expected, dtype)
            _compare(_inferred(forward, own), _inferred(passes.forward, doubles), dtype)


def _trained(
    forward: Pass, backward: Pass, maps: Sequence[Tensor], trial: _Trial, oracle: Any = None
) -> tuple[Any, list[Tensor | None]]:
    """Return what the passes make of z and the shortcut, and of the gradient.

    The gradient is of what an oracle made, if one is given: a ReLU of rounded values may cut at other places.
    """
    z, shortcut, grad = maps
    weights = _weights(z, trial.of_batch)
    made = forward(z, shortcut if trial.adds else None, weights, trial.relu, False)
    out, pooled, moments = oracle or made
    pooled, *moments = (t.to(vector_dtype(z)) for t in (pooled, *moments))
    given = grad, out.to(z.dtype) if trial.relu else None, z, pooled, weights._replace(moments=Moments(*moments))
    return made, backward(*given, [True, trial.adds, True, True, True, trial.of_batch])


def _inferred(forward: Pass, maps: Sequence[Tensor]) -> Tensor:
    """Return what becomes of z in its place, of a shortcut that has yet to go through its norm."""
    z, shortcut, _ = maps
    weights = _weights(z, of_batch=False)
    assert weights.moments is not None
    norm = Norm(weights.bias, weights.weight, *weights.moments, weights.eps)
    return forward(z.clone(), shortcut, weights._replace(shortcut_norm=norm), False, True)[0]


def _weights(z: Tensor, of_batch: bool) -> TailWeights:
    weight, bias, mean, spread = _random(4, z.shape[1]).to(z.device, vector_dtype(z))
    kernel, drop = (_random(*shape).to(z.device, vector_dtype(z)) for shape in ((1, 1, 5), (len(z), 1)))
    moments = None if of_batch else Moments(mean, spread.square() + 0.5)
    return TailWeights(kernel, torch.sigmoid, weight, bias, moments, None, drop, 1e-2)


def _random(*shape: int) -> Tensor:
    """Return the same numbers each time, and leave the generators that others use alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def _compare(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Compare tensors, and those in tuples and lists."""
    if isinstance(expected, Tensor):
        most = torch.finfo(dtype).eps ** 0.5 * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=most)
    elif expected is not None:
        for own, true in zip(found, expected):
            _compare(own, true, dtype)

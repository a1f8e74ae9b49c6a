"""The tails of a network's residual blocks alone: norm, attention, addition and ReLU at the shapes the network has."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import Timed, alternate
from systems import create
from torch import Tensor

from timm_eca.fused import blocks, forward

__all__ = ["time_tails"]


def time_tails(
    backbone: str, mode: str, batch: int, layout: Any, compiled: bool, size: int, rounds: int, device: str
) -> Timed:
    """Return what the rounds of each kind of tail took, and of copies of its map, summed over all blocks."""
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in (*TAILS, "copy")}
    moved = {"eca": 0, "copy": 0}  # bytes
    for block, shapes, count in distinct_tails(backbone, batch, size):
        torch.compiler.reset()  # of what was compiled for other shapes
        block.to(device)
        maps_of = partial(random_maps, shapes, device, layout)
        calls = {name: step_of(tail, block, maps_of(), mode, compiled) for name, tail in TAILS.items()}
        _, source, target = maps_of()
        calls["copy"] = partial(target.copy_, source)
        for call in calls.values():
            call()
        # A compiled network checks the guards of all its blocks once, before it starts; here they would run each time.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=compiled):
            taken = alternate(calls, rounds, warm_up=5, device=device)
        for name, own in taken.items():
            seconds[name] = [total + count * s for total, s in zip(seconds[name], own)]
        moved["eca"] += count * passes_over_maps(block, mode) * source.nbytes
        moved["copy"] += count * 2 * source.nbytes
    return Timed(seconds, moved)


def passes_over_maps(block: Any, mode: str) -> int:
    """Return how many maps of z's size are read or written by a tail that goes through z twice.

    Forward z, z, the shortcut and the output; backward the gradient, z, the output and the gradient below the ReLU,
    and then that, z and z's gradient.
    """
    adds, relu = getattr(block, "has_skip", True), block._rule.act is not None
    return (3 + adds) + (5 + 2 * relu if mode == "training" else 0)


def distinct_tails(backbone: str, batch: int, size: int) -> Iterator[tuple[Any, list[torch.Size], int]]:
    """Return the blocks of a network whose tails differ, the shapes of the last convolution's maps, and how many each.

    These are what it gets, u, and what it makes, z.
    """
    model = create(backbone, "eca").eval()
    found = [m for m in model.modules() if isinstance(m, blocks.FusedBlock)]
    shapes: list[tuple[torch.Size, torch.Size]] = []
    convs = [getattr(block, block._rule.conv) for block in found]
    hooks = [conv.register_forward_hook(lambda _, us, z: shapes.append((us[0].shape, z.shape))) for conv in convs]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    for block in found:
        block.downsample = None  # the shortcuts are those that have been through it
    kinds = [(*pair, getattr(block, "has_skip", True)) for block, pair in zip(found, shapes)]
    for kind in dict.fromkeys(kinds):
        yield found[kinds.index(kind)], [torch.Size([batch, *shape[1:]]) for shape in kind[:2]], kinds.count(kind)


def random_maps(shapes: list[torch.Size], device: str, layout: Any) -> list[Tensor]:
    """Return u, z and the shortcut."""
    return [torch.randn(shape, device=device).contiguous(memory_format=layout) for shape in (*shapes, shapes[1])]


def step_of(
    tail: Callable[..., Tensor], block: Any, maps: list[Tensor], mode: str, compiled: bool
) -> Callable[[], object]:
    """Return one call of a tail, with its backward pass in training; the maps are u, z and the shortcut."""
    training = mode == "training"
    block.train(training)
    adds = getattr(block, "has_skip", True)
    u, z, shortcut = maps
    grad = torch.randn_like(z)
    call: Any = torch.compile(tail if training else in_place(tail), fullgraph=True) if compiled else tail

    def infer() -> None:
        with torch.no_grad():
            call(block, u, z, shortcut if adds else None)

    def train() -> None:
        inputs = (z.detach().requires_grad_(), shortcut.detach().requires_grad_())
        call(block, u, inputs[0], inputs[1] if adds else None).backward(grad)

    return train if training else infer


def in_place(tail: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tail that writes where z was, as a compiler lets it in a network, where nothing else needs z."""
    return lambda block, u, z, shortcut: z.copy_(tail(block, u, z, shortcut))


def plain(block: Any, u: Tensor, z: Tensor, shortcut: Tensor | None) -> Tensor:
    """What a backbone without attention computes, as timm's blocks do."""
    return finish(block, getattr(block, block._rule.norm)(z), shortcut)


def eca(block: Any, u: Tensor, z: Tensor, shortcut: Tensor | None) -> Tensor:
    """The same with ECA, operation by operation."""
    rule = block._rule
    return finish(block, getattr(block, rule.attn)(getattr(block, rule.norm)(z)), shortcut)


def fused(block: Any, u: Tensor, z: Tensor, shortcut: Tensor | None) -> Tensor:
    """The same at once."""
    compiling = torch.compiler.is_compiling()
    parts = (blocks._graph_parts if compiling else blocks._fitting_parts)(block, z)  # the looking is part of the price
    tail = forward.compiled_tail if compiling else forward.eager_tail
    return tail(parts, z, shortcut, forward.mean_before(parts, u) if parts.pools else None)


def finish(block: Any, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Add and activate: in place in ResNets, out of place in inverted residuals, as timm has it."""
    if block._rule.act is None:
        return x if shortcut is None else x + shortcut
    x += shortcut
    return getattr(block, block._rule.act)(x)


TAILS = {"plain": plain, "eca": fused, "eca, plain path": eca}

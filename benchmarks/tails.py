"""The tails of a network's residual blocks alone: norm, attention, addition and ReLU at the shapes the network has.

In inference they begin with the norm before the block's last convolution, and its activation: this package's sums what
it makes there, so that the tail need not read its map for the gate. The convolution between the two is left out.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import Timed, alternate
from systems import create
from torch import Tensor

from timm_eca.fused import blocks, forward, pooled

__all__ = ["time_tails"]

Made = tuple[Tensor | None, Tensor]  # what the last convolution gets, and the block's output
Tail = Callable[[Any, Tensor | None, Tensor, Tensor | None], Made]


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
        before, source, target = maps_of()
        calls["copy"] = partial(target.copy_, source)
        for call in calls.values():
            call()
        # A compiled network checks the guards of all its blocks once, before it starts; here they would run each time.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=compiled):
            taken = alternate(calls, rounds, warm_up=5, device=device)
        for name, own in taken.items():
            seconds[name] = [total + count * s for total, s in zip(seconds[name], own)]
        moved["eca"] += count * bytes_moved(block, mode, before.nbytes, source.nbytes)
        moved["copy"] += count * 2 * source.nbytes
    return Timed(seconds, moved)


def bytes_moved(block: Any, mode: str, before: int, own: int) -> int:
    """Return what a tail has to read and write.

    In inference the map before the last convolution is read and written, and z, the shortcut and the output are moved
    once. In training z is gone through twice: forward z, z, the shortcut and the output; backward the gradient, z, the
    output and the gradient below the ReLU, and then that, z and z's gradient.

    Args:
        block: The block.
        mode: "inference" or "training".
        before: Bytes of the map before the last convolution.
        own: Bytes of z.
    """
    adds, relu = getattr(block, "has_skip", True), block._rule.act is not None
    return 2 * before + (2 + adds) * own if mode == "inference" else (8 + adds + 2 * relu) * own


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
    """Return the map before the last convolution, before its norm, and z and the shortcut."""
    return [torch.randn(shape, device=device).contiguous(memory_format=layout) for shape in (*shapes, shapes[1])]


def step_of(tail: Tail, block: Any, maps: list[Tensor], mode: str, compiled: bool) -> Callable[[], object]:
    """Return one call of a tail, in training with its backward pass and without the norm before."""
    training = mode == "training"
    block.train(training)
    adds = getattr(block, "has_skip", True)
    before, z, shortcut = maps
    added = shortcut if adds else None
    grad = torch.randn_like(z)
    call: Any = torch.compile(tail if training else in_place(tail), fullgraph=True) if compiled else tail

    def infer() -> None:
        with torch.no_grad():
            call(block, before, z, added)

    def train() -> None:
        leaf = z.detach().requires_grad_()
        call(block, None, leaf, added if added is None else added.detach().requires_grad_())[1].backward(grad)

    return train if training else infer


def in_place(tail: Tail) -> Callable[..., None]:
    """A tail that writes where its maps were, as a compiler lets it in a network, where nothing else needs them."""

    def overwrite(block: Any, before: Tensor, z: Tensor, shortcut: Tensor | None) -> None:
        for given, made in zip((before, z), tail(block, before, z, shortcut)):
            if made is not given:
                given.copy_(made)

    return overwrite


def plain(block: Any, before: Tensor | None, z: Tensor, shortcut: Tensor | None) -> Made:
    """What a backbone without attention computes, as timm's blocks do."""
    return norm_before(block, before), finish(block, getattr(block, block._rule.norm)(z), shortcut)


def eca(block: Any, before: Tensor | None, z: Tensor, shortcut: Tensor | None) -> Made:
    """The same with ECA, operation by operation."""
    rule = block._rule
    return norm_before(block, before), finish(block, getattr(block, rule.attn)(getattr(block, rule.norm)(z)), shortcut)


def fused(block: Any, before: Tensor | None, z: Tensor, shortcut: Tensor | None) -> Made:
    """The same at once."""
    compiling = torch.compiler.is_compiling()
    parts = (blocks._graph_parts if compiling else blocks._fitting_parts)(block, z)  # the looking is part of the price
    tail = forward.compiled_tail if compiling else forward.eager_tail
    if before is None:
        return None, tail(parts, z, shortcut, None)
    norm = pooled.SummedNorm(parts.norms[-1], parts.conv, pooled.graph_pool if compiling else pooled.compiled_pool)
    return norm(before), tail(parts, z, shortcut, norm.pooled)


def norm_before(block: Any, x: Tensor | None) -> Tensor | None:
    """Return what the norm before the last convolution, and its activation, make of a map, if one is given."""
    if x is None:
        return None
    rule = block._rule.inner[-1]
    for name in [rule.norm] if rule.is_own else [rule.norm, rule.drop, rule.act]:
        x = x if name is None else getattr(block, name)(x)
    return x


def finish(block: Any, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Add and activate: in place in ResNets, out of place in inverted residuals, as timm has it."""
    if block._rule.act is None:
        return x if shortcut is None else x + shortcut
    x += shortcut
    return getattr(block, block._rule.act)(x)


TAILS = {"plain": plain, "eca": fused, "eca, plain path": eca}

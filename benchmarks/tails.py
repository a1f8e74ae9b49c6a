"""The tails of a network's residual blocks alone: norm, attention, addition and ReLU at the shapes the network has.

In inference they begin with the norm before the block's last convolution, and its activation: this package's sums what
it makes there, so that the tail need not read its map for the gate. The convolution between the two is left out.

The kinds of tail take turns on the same maps, because what a pass takes depends on where its maps lie. Of compiled
tails it is the graph that is called, without the looks that `torch.compile` takes before it: a network has those once.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch
from measure import Timed, alternate
from systems import create
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from timm_eca.fused import blocks, forward, pooled

__all__ = ["time_tails"]

Made = tuple[Tensor | None, Tensor]  # what the last convolution gets, and the block's output
Tail = Callable[[Any, Tensor | None, Tensor, Tensor | None], Made]
Maps = tuple[Tensor, Tensor, Tensor]  # the map before the last convolution, before its norm, and z and the shortcut


def time_tails(
    backbone: str, mode: str, batch: int, layout: Any, compiled: bool, size: int, rounds: int, device: str
) -> Timed:
    """Return what the rounds of each kind of tail took, and of copies of its map, summed over all blocks."""
    seconds: dict[str, list[float]] = {name: [0.0] * rounds for name in (*TAILS, "copy")}
    moved = {"eca": 0, "copy": 0}  # bytes
    for block, shapes, count in distinct_tails(backbone, batch, size):
        block.to(device)
        maps = [random_maps(shapes, device, layout) for _ in TAILS]
        calls: dict[str, Callable[[], object]] = {}
        for turn, (name, tail) in enumerate(TAILS.items()):
            calls[name] = step_of(tail, block, maps[turn:] + maps[:turn], mode, compiled)
        before, source, target = random_maps(shapes, device, layout)
        calls["copy"] = partial(target.copy_, source)
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


def random_maps(shapes: list[torch.Size], device: str, layout: Any) -> Maps:
    """Return the map before the last convolution, before its norm, and z and the shortcut."""
    before, z = shapes
    return tuple(torch.randn(shape, device=device).contiguous(memory_format=layout) for shape in (before, z, z))


def step_of(tail: Tail, block: Any, maps: list[Maps], mode: str, compiled: bool) -> Callable[[], object]:
    """Return one call of a tail, in training with its backward pass and without the norm before.

    Args:
        tail: What computes it.
        block: The block.
        maps: What it is computed of, in turn.
        mode: "inference" or "training".
        compiled: Whether to call the graph that a compiler makes of it.
    """
    training = mode == "training"
    block.train(training)
    adds = getattr(block, "has_skip", True)
    turns = cycle(maps)
    grad = torch.randn_like(maps[0][1])
    call: Any = tail if not compiled else graph_of(tail if training else in_place(tail))

    @torch.no_grad()
    def infer() -> None:
        before, z, shortcut = next(turns)
        call(block, before, z, shortcut if adds else None)

    def train() -> None:
        z, shortcut = (given.detach().requires_grad_() for given in next(turns)[1:])
        call(block, None, z, shortcut if adds else None)[-1].backward(grad)

    step = train if training else infer
    step()
    return step


def graph_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call, and then call the graph alone, with the same block and other maps."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled = compile_fx(graph, inputs)

        def run(*given: Any) -> Any:
            made[:] = compiled, given
            return compiled(*given)

        return run

    def call(*args: Any) -> Any:
        if not places:
            torch.compiler.reset()
            result = torch.compile(function, fullgraph=True, backend=backend)(*args)
            places.extend(next((i for i, arg in enumerate(args) if arg is t), None) for t in made[1])
            return result
        graph, given = made
        return graph(*[t if i is None else args[i] for i, t in zip(places, given)])

    places: list[int | None] = []
    return call


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

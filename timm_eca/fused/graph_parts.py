"""The parts of a block's tail for a graph: what is settled when it is made, and the tensors that a compiler follows."""

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import nn

from .eligible import Parts, adds_shortcut, find_parts, transformed
from .formula import Act
from .halves import TailRule
from .norms import GraphNorm, NormPart

__all__ = ["graph_parts"]


class Facts(NamedTuple):
    """What a compiler takes as settled when it makes a graph of a block's tail.

    Each look that the compiler followed would be a guard, taken again before every run of the graph.
    """

    fit: bool
    frozen: bool = False
    sigmoid: bool = False
    shortcut_norm: bool = False
    shortcut_frozen: bool = False
    acts: tuple[Act, ...] = ()
    frozen_inside: tuple[bool, ...] = ()
    pools: bool = False
    sums: bool = False


@torch.compiler.assume_constant_result
def _facts(block: Any) -> Facts:
    parts = find_parts(block, block._rule)
    patched = type(block).forward is not block._plain_forward
    if parts is None or not parts.still_fit(block) or patched or transformed():
        return Facts(False)
    last = parts.shortcut_norm
    return Facts(
        fit=True,
        frozen=parts.norm.frozen,
        sigmoid=parts.gate is torch.sigmoid,
        shortcut_norm=last is not None,
        shortcut_frozen=last is not None and last.frozen,
        acts=tuple(norm.act for norm in parts.norms),
        frozen_inside=tuple(norm.norm.frozen for norm in parts.norms),
        pools=parts.pools,
        sums=parts.sums,
    )


def graph_parts(block: Any, rule: TailRule) -> Parts | None:
    """As `find_parts`, of a block that a compiler makes a graph of: with the tensors themselves, which it follows.

    Of each module at least the class is asked for, so that a graph is not run for a block that has got another one.
    """
    facts = _facts(block)
    if not facts.fit:
        return None
    modules = block._modules
    inner = modules[rule.attn]._modules
    gate, drop_path = inner["gate"], block.drop_path
    downsample: Any = block.downsample if "downsample" in rule.rest else None
    act = modules[rule.act] if rule.act else None
    return Parts(
        adds=adds_shortcut(block, rule),
        conv=modules[rule.conv],
        norm=_norm_now(modules[rule.norm], facts.frozen),
        kernel=_now(inner["conv"], "weight"),
        gate=torch.sigmoid if isinstance(gate, nn.Module) and facts.sigmoid else gate,
        drop_path=drop_path if isinstance(drop_path, DropPath) else None,
        downsample=downsample,
        shortcut_norm=_norm_now(downsample[-1], facts.shortcut_frozen) if facts.shortcut_norm else None,
        act=act,
        relu=type(act) is nn.ReLU,
        pools=facts.pools,
        norms=_norms_now(modules, rule, facts),
        sums=facts.sums,
    )


def _norms_now(modules: dict[str, Any], rule: TailRule, facts: Facts) -> tuple[GraphNorm, ...]:
    """Return the norms of a first half for a graph."""
    found = []
    for norm, act, frozen in zip(rule.inner, facts.acts, facts.frozen_inside):
        own = modules[norm.norm]
        rest = [] if norm.is_own else [modules[name] for name in (norm.drop, norm.act) if name is not None]
        beside = rest or [own._modules["drop"], own._modules["act"]]
        if not all(isinstance(module, nn.Module) for module in beside):  # always so; asked, their classes are guarded
            return ()
        found.append(GraphNorm(_norm_now(own, frozen), act, (own, *rest)))
    return tuple(found)


def _norm_now(norm: Any, frozen: bool) -> NormPart:
    return NormPart(norm, frozen, _now(norm, "weight", "bias"), _now(norm, "running_mean", "running_var"))


def _now(module: nn.Module, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}

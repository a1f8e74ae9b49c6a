"""A block's forward in two halves, cut at its last convolution.

The halves are timm's own source: a fused block runs the first as it is, and the second where it cannot fuse. A new
timm whose forward no longer fits its rule is not cut, and its blocks are not fused.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Halves", "NormRule", "TailRule", "halves_of"]


class NormRule(NamedTuple):
    """A norm before the last convolution, and what follows it: paths of modules in the block, in their order.

    Attributes:
        conv: The convolution before it.
        norm: The norm.
        drop: What has to do nothing, None where there is no such module.
        act: The activation, which may be the norm's own.
    """

    conv: str
    norm: str
    drop: str | None
    act: str

    @property
    def is_own(self) -> bool:
        """Whether the activation is in the norm."""
        return "." in self.act


class TailRule(NamedTuple):
    """What the end of a block's forward consists of: names of the block's attributes.

    Attributes:
        conv: The convolution between the halves.
        norm: The norm after it.
        attn: The attention after the norm.
        act: The activation after the addition, None where there is none.
        rest: What else the second half uses.
        inner: The norms of the first half.
        between: What may be between the last of them and the convolution.
    """

    conv: str
    norm: str
    attn: str
    act: str | None
    rest: frozenset[str]
    inner: tuple[NormRule, ...]
    between: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """All that the second half uses."""
        return {self.norm, self.attn, *self.rest} | ({self.act} if self.act else set())


class Halves(NamedTuple):
    """The two halves of a forward: `head(block, x)` returns what the convolution gets, and the shortcut.

    `normed_head(block, x, norms)` does the same with a function of its own for each norm and what belongs to it.
    `tail(block, z, shortcut)` gets what the convolution made of it.
    """

    head: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    normed_head: Callable[[nn.Module, Tensor, Sequence[Callable[[Tensor], Tensor]]], tuple[Tensor, Tensor]]
    tail: Callable[[nn.Module, Tensor, Tensor], Tensor]


@cache
def halves_of(cls: type[nn.Module], rule: TailRule) -> Halves | None:
    """Return the halves of a class's forward, None where it is not as its rule says."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(cls.forward))).body[0]
    except (OSError, TypeError):
        return None
    assert isinstance(function, ast.FunctionDef)
    cut = next((i for i, line in enumerate(function.body) if rule.norm in _own_names(line)), 0)
    head, tail = function.body[: max(cut - 1, 0)], function.body[cut:]
    names = set().union(*map(_own_names, tail))
    if not head or ast.unparse(function.body[cut - 1]) != f"x = self.{rule.conv}(x)" or names != rule.names:
        return None
    scope = vars(sys.modules[cls.forward.__module__])
    normed = _normed(head, rule)
    if normed is None:
        return None
    given = ast.parse("return x, shortcut").body
    return Halves(
        _function("head", ["self", "x"], [*head, *given], scope),
        _function("normed_head", ["self", "x", "norms"], [*normed, *given], scope),
        _function("tail", ["self", "x", "shortcut"], tail, scope),
    )


def _normed(head: list[ast.stmt], rule: TailRule) -> list[ast.stmt] | None:
    """Return a first half that calls `norms[i]` for its norms, None where those are not as their rules say."""
    source = "\n".join(map(ast.unparse, head))
    for i, norm in enumerate(rule.inner):
        called = norm[:2] if norm.is_own else [path for path in norm if path is not None]
        conv, *rest = (f"x = self.{path}(x)" for path in called)
        steps = "\n".join((conv, *rest))
        if steps not in source:
            return None
        source = source.replace(steps, f"{conv}\nx = norms[{i}](x)")
    calls = (f"x = self.{name}(x)" for name in rule.between)
    known = {step for call in calls for step in (call, f"if {call.split()[2][:-3]} is not None:\n    {call}")}
    after = ast.parse(source.partition(f"x = norms[{len(rule.inner) - 1}](x)")[2]).body
    return ast.parse(source).body if known.issuperset(map(ast.unparse, after)) else None


def _own_names(node: ast.AST) -> set[str]:
    """The attributes of self that a piece of source uses."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }


def _function(name: str, args: list[str], body: list[ast.stmt], scope: dict[str, Any]) -> Callable[..., Any]:
    function = ast.parse(f"def {name}({', '.join(args)}): pass")
    function.body[0].body = body  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(function), f"<{name}>", "exec"), scope, namespace)
    return namespace[name]

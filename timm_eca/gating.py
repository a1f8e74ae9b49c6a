"""Blocks whose forward passes one tensor through an attention layer.

Most of timm's blocks have no place for a layer at the end of their branch. Here a block's class gets a subclass whose
`forward` is timm's own with one expression wrapped: `self.bn3(x)` becomes `self.attn_last(self.bn3(x))`, and the layer
is a child of the block. Hooks on norms and convolutions, and wrappers around them, get lost when norms are converted
(SyncBatchNorm, frozen norms) or branches are fused; a child that the block itself calls does not. The result is
ordinary source code: TorchScript, fx, export and `torch.compile` treat it as they treat timm's.
"""

import ast
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

__all__ = ["RETURN", "Gate", "gain_name", "gate_block_", "gated_class"]

RETURN = "return"


class Gate(NamedTuple):
    """One tensor of a forward that passes through one child.

    Attributes:
        child: Name of the child, or path of a child's child.
        expressions: Expressions of forward with braces around what is gated, such as `{self.bn3(x)}`, separated by
            ` | ` where several say the same; all occurrences are gated. `RETURN` stands for what forward returns.
            A name and a colon before an expression: it is in that method.
        layout: What the tensor is: 'NCHW', 'NHWC', or 'tokens' (B, N, C). The child gets (B, C, H, W) all the same;
            tokens as a column, H = N and W = 1.
        gain: Whether the tensor is multiplied by the block's buffer `gain_name(child)` first.
    """

    child: str
    expressions: str
    layout: str = "NCHW"
    gain: bool = False

    def call(self, expression: str) -> str:
        """Return the source that stands for an expression of forward."""
        if self.gain:
            expression = f"({expression}) * self.{gain_name(self.child)}"
        return _CALLS[self.layout].format(call=f"self.{self.child}", x=f"({expression})")


_CALLS = {
    "NCHW": "({call}({x}))",
    "NHWC": "({call}({x}.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))",
    "tokens": "({call}({x}.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2))",
}


def gain_name(child: str) -> str:
    """Return the name of the buffer that scales what a child gates."""
    return f"{child}_gain"


def gate_block_(block: nn.Module, gates: tuple[Gate, ...]) -> None:
    """Make a block call the children named by its gates. The block's class changes to a subclass of it."""
    block.__class__ = gated_class(type(block), gates)


_classes: dict[tuple[type[nn.Module], tuple[Gate, ...]], type[nn.Module]] = {}


def gated_class(block_cls: type[nn.Module], gates: tuple[Gate, ...]) -> type[nn.Module]:
    """Return the subclass of a block's class whose forward passes tensors through children.

    Raises:
        ValueError: If the source of forward cannot be had or an expression is not in it.
    """
    if (block_cls, gates) not in _classes:
        _classes[block_cls, gates] = _gated_class(block_cls, gates)
    return _classes[block_cls, gates]


def _gated_class(block_cls: type[nn.Module], gates: tuple[Gate, ...]) -> type[nn.Module]:
    name = f"{block_cls.__name__}WithAttn"
    functions: dict[str, ast.FunctionDef] = {}
    for gate in gates:
        for expression in gate.expressions.split(" | "):
            method, expression = _method_of(expression)
            function = functions.setdefault(method, _source_of(block_cls, method))
            _insert(function, block_cls, gate, expression)
    members: dict[str, Any] = {"__module__": __name__, "__reduce_ex__": _reduce, "_made_from": (block_cls, gates)}
    members |= {fusion: _Absent() for fusion in FUSIONS if hasattr(block_cls, fusion)}
    members |= {cut: _cut(cut) for cut in CUTS if hasattr(block_cls, cut)}
    for method, function in functions.items():
        namespace: dict[str, Any] = {}
        code = _compiled(function, f"<{method} of {name} of {block_cls.__module__} {hash(gates):x}>")
        exec(code, vars(sys.modules[getattr(block_cls, method).__module__]), namespace)
        members[method] = namespace[method]
        members[method].__qualname__ = f"{name}.{method}"
    return type(name, (block_cls,), members)


def _method_of(expression: str) -> tuple[str, str]:
    """Split off the name of the method where it is not forward."""
    named = re.match(r"(\w+): (.+)", expression)
    return (named[1], named[2]) if named else ("forward", expression)


FUSIONS = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which timm fuses a block into one convolution, which would drop the layer; its children still fuse."""


class _Absent:
    """A class attribute that instances lack."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"a block with attention has no {self.name}()")


CUTS = ("prune_to_tap",)
"""Methods by which timm cuts off what comes after a feature inside a block: the end of the branch, and the layer."""


def _cut(name: str) -> Callable[[Any], None]:
    def cut(block: Any) -> None:
        block_cls, gates = block._made_from
        for gate in gates:
            delattr(block, gate.child)
        block.__class__ = block_cls
        getattr(block, name)()

    return cut


def _reduce(block: Any, protocol: int) -> tuple[Any, ...]:
    """How pickle and copy make such a block again: its class is not one that can be imported."""
    return _make, block._made_from, block.__getstate__()


def _make(block_cls: type[nn.Module], gates: tuple[Gate, ...]) -> nn.Module:
    cls = gated_class(block_cls, gates)
    return cls.__new__(cls)


def _source_of(block_cls: type[nn.Module], method: str) -> ast.FunctionDef:
    try:
        source = textwrap.dedent(inspect.getsource(getattr(block_cls, method)))
    except (OSError, TypeError, AttributeError) as error:
        message = f"Attention goes into the source of {block_cls.__name__}.{method}, which cannot be had."
        raise ValueError(message) from error
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


def _insert(function: ast.FunctionDef, block_cls: type[nn.Module], gate: Gate, expression: str) -> None:
    if expression == RETURN:
        editor: _Editor = _ReturnEditor(gate)
    else:
        gated = expression[expression.index("{") + 1 : expression.rindex("}")]
        editor = _ExpressionEditor(
            before=_parsed(expression.replace("{" + gated + "}", f"({gated})")),
            after=_parsed(expression.replace("{" + gated + "}", gate.call(gated))),
        )
    editor.visit(function)
    if not editor.count:
        raise ValueError(f"{block_cls.__name__}.{function.name} has no expression {expression}.")


def _parsed(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


class _Editor(ast.NodeTransformer):
    count = 0


class _ExpressionEditor(_Editor):
    """Replaces every occurrence of one expression by another."""

    def __init__(self, before: ast.expr, after: ast.expr):
        self.before, self.after = ast.dump(before), after

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and ast.dump(node) == self.before:
            self.count += 1
            return self.after
        return super().generic_visit(node)


class _ReturnEditor(_Editor):
    """Gates the value of every return statement."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None:
            self.count += 1
            node.value = _parsed(self.gate.call(ast.unparse(node.value)))
        return node


def _compiled(function: ast.FunctionDef, filename: str) -> Any:
    source = ast.unparse(ast.fix_missing_locations(function)) + "\n"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # TorchScript reads it there
    return compile(source, filename, "exec")

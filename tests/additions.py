"""What a running model adds to its skip connections, seen without knowing any rule of placement.

One forward pass is recorded. Each tensor carries what went into it and whether it has passed through attention since
the last weighted operation. An addition is residual if one operand is made from the other: that one is the skip.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

WEIGHTED = {
    "conv2d",
    "linear",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "conv_transpose2d",
    "_native_multi_head_attention",
    "scaled_dot_product_attention",
}
SELF_ATTENTION = {"softmax", "scaled_dot_product_attention", "_native_multi_head_attention", "matmul", "__matmul__"}
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass
class Trace:
    """Facts of one tensor."""

    ancestors: frozenset[int] = frozenset()
    gated: bool = False


@dataclass
class Addition:
    """One residual addition.

    Attributes:
        modules: Classes of the modules it happens in, outermost first.
        gated: Whether the branch has passed through attention after its last weighted operation.
        functions: What the branch was made by, from where it left the skip.
    """

    modules: tuple[str, ...]
    gated: bool
    functions: frozenset[str]

    @property
    def convolutional(self) -> bool:
        """Whether the branch has a convolution, and is no self-attention."""
        return "conv2d" in self.functions and not self.functions & SELF_ATTENTION


@dataclass
class Recorder(TorchFunctionMode):
    """Records the residual additions of the code that runs under it."""

    attention: type[nn.Module]
    additions: list[Addition] = field(default_factory=list)
    traces: dict[int, Trace] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    makers: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            module.register_forward_pre_hook(lambda m, _: self.stack.append(type(m).__name__))
            module.register_forward_hook(self._leave)

    def _leave(self, module, _, output):
        self.stack.pop()
        if isinstance(module, self.attention):
            self.trace(output).gated = True

    def trace(self, tensor: torch.Tensor) -> Trace:
        return self.traces.setdefault(id(tensor), Trace())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        operands = [a for a in _flat((args, kwargs)) if isinstance(a, torch.Tensor)]
        name = getattr(function, "__name__", "")
        if name in ADDITIONS and len(operands) == 2:
            self._add(*operands)
        before = {id(t): self.trace(t) for t in operands}
        result = function(*args, **(kwargs or {}))
        for output in _flat(result):
            if isinstance(output, torch.Tensor):
                self.kept.append(output)  # so that no id is used twice
                self.traces[id(output)] = self._after(name, operands, before)
                self.makers.setdefault(id(output), name)
        return result

    def _after(self, name, operands, before) -> Trace:
        ancestors = frozenset().union(*(t.ancestors for t in before.values()), before)
        gated = name not in WEIGHTED and any(t.gated for t in before.values()) and "cat" not in name
        return Trace(ancestors, gated and name not in ADDITIONS)

    def _add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.shape != b.shape or a.ndim != 4:
            return
        for skip, branch in ((a, b), (b, a)):
            if id(skip) in self.trace(branch).ancestors:
                made = (self.trace(branch).ancestors | {id(branch)}) - self.trace(skip).ancestors - {id(skip)}
                functions = frozenset(self.makers[i] for i in made if i in self.makers)
                self.additions.append(Addition(tuple(self.stack), self.trace(branch).gated, functions))


def _flat(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value

"""The form of a row in the table of blocks, and how rows of one kind are written."""

from typing import NamedTuple

__all__ = ["BlockRule", "after_norm", "byob", "cell", "row", "rule_key"]


class BlockRule(NamedTuple):
    """Where a block's branch ends. Paths are relative to the block.

    Attributes:
        gate: Expression of the block's forward, braces around the tensor that ends the branch.
        width: Modules whose output channels, summed, are that tensor's; `<` is the last convolution before the block.
        scale: What scales that tensor linearly: paths of modules (their weight and bias) or of tensors; after a `/`
            what must shrink by the same factor. Modules that a block lacks are skipped; None: the modules of `width`;
            nothing where no weights do, or where they would scale more than that tensor.
        slot: Attribute that forward calls on that tensor anyway, empty in a plain block.
        se: Attributes that may hold squeeze-and-excitation inside the branch.
        keep: Expression of forward for a layer that follows what the slot holds.
        nhwc: Whether the tensor is (B, H, W, C).
        when: Attribute of the block that must be true for the row to hold; of a child's rows the first that holds
            counts.
        where: Placements in which the row holds.
        family: timm's module in whose models alone the row holds.
        child: Name of the layer where it has no slot. Blocks with two branches have rows for two children.
    """

    gate: str
    width: tuple[str, ...]
    scale: tuple[str, ...] | None = None
    slot: str | None = None
    se: tuple[str, ...] = ()
    keep: str | None = None
    nhwc: bool = False
    when: str | None = None
    child: str = "attn_last"
    where: tuple[str, ...] = ("auto", "end", "add")
    family: str | None = None


def row(gate: str, *width: str, **kwargs) -> BlockRule:
    return BlockRule(gate, width, **kwargs)


def after_norm(norm: str, variable: str, slot: str = "se") -> tuple[BlockRule]:
    """A block with a slot after its last norm."""
    gate = f"{{self.{norm}({variable})}}"
    return (row(gate, norm, slot=slot, keep=f"{{self.{slot}({variable})}}"),)


def byob(conv: str) -> tuple[BlockRule]:
    return (row(f"{{self.{conv}(x)}}", f"{conv}.bn", slot="attn_last", se=("attn",), keep="{self.attn_last(x)}"),)


def cell(part: str, parts: int) -> tuple[BlockRule]:
    """A cell whose output concatenates parts of equal width."""
    return (row("{x_out}", *([part] * parts), scale=()),)


def rule_key(cls: type) -> str:
    """Return the key of a class in the table of blocks: that of the class whose forward it has, empty for others'.

    A class of another package may share its name, and even its module's, with one of timm's; a subclass of timm's that
    keeps the forward is the same block.
    """
    for base in cls.__mro__:
        if base.__module__.startswith(("timm.", "torch.nn.")):
            inherited = getattr(cls, "forward", None) is getattr(base, "forward", None)
            return f"{base.__module__.rpartition('.')[2]}:{base.__name__}" if inherited else ""
    return ""

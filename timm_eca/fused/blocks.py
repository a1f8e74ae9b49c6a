"""Blocks that compute their tail at once where they can, and plainly where they cannot."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from ..block_rule import rule_key
from ..gating import gated_class
from .eligible import Parts, find_parts, is_eca, unwatched
from .forward import compiled_tail, eager_tail, fused_forward
from .graph_parts import graph_parts
from .halves import Halves, NormRule, TailRule, halves_of
from .pooled import compiled_pool, graph_pool

__all__ = ["fuse_", "fuse_blocks_", "unfuse_"]

_ModelT = TypeVar("_ModelT", bound=nn.Module)

_RESNET = frozenset({"drop_path", "downsample"})
_MBCONV = frozenset({"drop_path", "has_skip"})
_BLUR, _BLUR_SE = ("aa",), ("aa", "se")
_BASIC = (NormRule("conv1", "bn1", "drop_block", "act1"),)
_BOTTLENECK = (NormRule("conv1", "bn1", None, "act1"), NormRule("conv2", "bn2", "drop_block", "act2"))
_SEPARABLE = (NormRule("conv_dw", "bn1", "bn1.drop", "bn1.act"),)
_EDGE = (NormRule("conv_exp", "bn1", "bn1.drop", "bn1.act"),)
_INVERTED = (
    NormRule("conv_pw", "bn1", "bn1.drop", "bn1.act"),
    NormRule("conv_dw", "bn2", "bn2.drop", "bn2.act"),
)

RULES = {
    "resnet:BasicBlock": TailRule("conv2", "bn2", "se", "act2", _RESNET, _BASIC, _BLUR),
    "resnet:Bottleneck": TailRule("conv3", "bn3", "se", "act3", _RESNET, _BOTTLENECK, _BLUR),
    **{
        f"_efficientnet_blocks:{name}": TailRule(conv, norm, "attn_last", None, _MBCONV, inner, _BLUR_SE)
        for name, conv, norm, inner in (
            ("DepthwiseSeparableConv", "conv_pw", "bn2", _SEPARABLE),
            ("EdgeResidual", "conv_pwl", "bn2", _EDGE),
            ("InvertedResidual", "conv_pwl", "bn3", _INVERTED),
        )
    },
}
"""What the tail of a block consists of, by timm's `module:Class`."""


class FusedBlock(nn.Module):
    """What a fused block adds to its class. `forward` stays timm's: whoever calls, scripts or traces it gets that."""

    __jit_ignored_attributes__ = ("_parts", "_zero_kernel")

    _rule: TailRule
    _halves: Halves
    _plain_forward: Callable[..., Tensor]
    _parts: Parts | None = None
    _zero_kernel: int | bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:
            return super().__call__(*args, **kwargs)
        compiling = is_compiling()
        parts = _graph_parts(self, *args) if compiling else _fitting_parts(self, *args)
        if parts is None:
            return super().__call__(*args)
        if compiling:
            return fused_forward(self, parts, *args, compiled_tail, graph_pool)
        return fused_forward(self, parts, *args, eager_tail, compiled_pool)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if FusedBlock not in type(self).__bases__:  # a class that somebody made of the fused one
            return super().__reduce_ex__(protocol)
        plain = plain_class(type(self))
        kept = self.__getstate__()
        state = {name: value for name, value in kept.items() if name not in self.__jit_ignored_attributes__}
        return _make, getattr(plain, "_made_from", (plain, ())), state


def fuse_(model: _ModelT) -> _ModelT:
    """Make every block with ECA at the end of its branch compute norm, attention and addition at once, in place.

    The function computed, the state dict and the ways to train, save and export stay the same; feature maps kept for
    the backward pass shrink to those of the network without attention. Blocks whose parts do not allow it, or that
    are hooked, traced or transformed, compute plainly.

    Args:
        model: A model of timm with ResNet's blocks or inverted residuals, timm's own `ecaresnet*` included.

    Raises:
        ValueError: If no block of the model can be fused.
    """
    if not fuse_blocks_(model):
        kinds = ", ".join(key.partition(":")[2] for key in RULES)
        raise ValueError(
            f"{type(model).__name__} has no block that can be fused, which is one of {kinds} with 'eca' at the end of"
            " its branch."
        )
    return model


def unfuse_(model: _ModelT) -> _ModelT:
    """Make every block compute plainly again, in place.

    Raises:
        ValueError: If a block's class was since made into another one, as FSDP's `fully_shard` does.
    """
    blocks: list[Any] = [block for block in model.modules() if isinstance(block, FusedBlock)]
    wrapped = {type(block).__name__ for block in blocks if FusedBlock not in type(block).__bases__}
    if wrapped:
        raise ValueError(f"Fused blocks have become {', '.join(wrapped)}: call unfuse_ before what made that of them.")
    for block in blocks:
        block.__class__ = plain_class(type(block))
        for name in FusedBlock.__jit_ignored_attributes__:
            block.__dict__.pop(name, None)
    return model


def fuse_blocks_(model: nn.Module) -> int:
    """Fuse what can be fused, and return how many blocks are."""
    count = 0
    for block in model.modules():
        cls = None if isinstance(block, FusedBlock) else fused_class(type(block))
        if cls is not None and is_eca(getattr(block, cls._rule.attn)):
            block.__class__ = cls
        count += isinstance(block, FusedBlock)
    return count


_classes: dict[type[nn.Module], type[FusedBlock] | None] = {}


def fused_class(cls: type[nn.Module]) -> type[FusedBlock] | None:
    """Return the fused subclass of a block's class, None where there is none.

    It has the name of its class: a model reads the same, and tables by class name hold.
    """
    if cls not in _classes:
        _classes[cls] = _fused_class(cls)
    return _classes[cls]


def _fused_class(cls: Any) -> type[FusedBlock] | None:
    rule = RULES.get(rule_key(getattr(cls, "_made_from", (cls,))[0]))
    halves = halves_of(cls, rule) if rule else None
    if halves is None:
        return None
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        cls.__name__,
        (FusedBlock, cls),
        {**names, "_rule": rule, "_halves": halves, "_plain_forward": staticmethod(cls.forward)},
    )


def plain_class(cls: type[FusedBlock]) -> type[nn.Module]:
    """Return the class that a fused one was made from."""
    fused = next(base for base in cls.__mro__ if FusedBlock in base.__bases__)
    return fused.__bases__[1]


def _make(block_cls: type[nn.Module], gates: Any) -> nn.Module:
    """How pickle and copy make a fused block again: its class is not one that can be imported."""
    plain = gated_class(block_cls, gates) if gates else block_cls
    cls = fused_class(plain) or plain
    return cls.__new__(cls)


def _graph_parts(block: Any, x: Tensor) -> Parts | None:
    """Return the parts of a block's tail if it can be fused in the graph that is being made."""
    # Exported graphs keep the norms that quantizers and converters look for.
    return None if x.is_meta or is_exporting() else graph_parts(block, block._rule)


def _fitting_parts(block: Any, x: Tensor) -> Parts | None:
    """Return the parts of a block's tail if it can be fused now."""
    if x.is_meta or block._compiled_call_impl is not None or not unwatched():
        return None
    if type(block).forward is not block._plain_forward:
        return None
    parts = block._parts
    if parts is None or not parts.still_fit(block):
        parts = block._parts = _present(block, find_parts(block, block._rule))
    return None if parts is None or _starts_as_identity(block, parts) else parts


def _present(block: nn.Module, parts: Parts | None) -> Parts | None:
    return parts if parts is not None and parts.still_fit(block) else None


def _starts_as_identity(block: Any, parts: Parts) -> bool:
    """Whether the kernel is still zero: an identity start keeps the backbone's function bit for bit, so it is plain.

    A kernel seen to be not zero is not looked at again, one seen to be zero when something was written to it.
    """
    if block._zero_kernel is False:
        return False
    kernel = parts.kernel["weight"]
    version = None if kernel.is_inference() else kernel._version
    if version is None or block._zero_kernel != version:
        block._zero_kernel = version if not kernel.any() else False
    return block._zero_kernel is not False

"""Blocks that compute their tail at once where they can, and plainly where they cannot."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..block_rule import rule_key
from ..gating import gated_class
from .eligible import Parts, find_parts, graph_parts, is_eca, map_fits, unwatched
from .formula import Moments, Norm, Running, TailWeights
from .halves import Halves, TailRule, halves_of
from .pooled import pooled_before
from .tail import fused_tail, graph_tail

__all__ = ["fuse_", "fuse_blocks_", "unfuse_"]

_ModelT = TypeVar("_ModelT", bound=nn.Module)

_SMALL = 1 << 18  # elements of a map; in training a compiler gets the tails of smaller ones as they are

_RESNET = frozenset({"drop_path", "downsample"})
_MBCONV = frozenset({"drop_path", "has_skip"})

RULES = {
    "resnet:BasicBlock": TailRule("conv2", "bn2", "se", "act2", _RESNET),
    "resnet:Bottleneck": TailRule("conv3", "bn3", "se", "act3", _RESNET),
    "_efficientnet_blocks:DepthwiseSeparableConv": TailRule("conv_pw", "bn2", "attn_last", None, _MBCONV),
    "_efficientnet_blocks:EdgeResidual": TailRule("conv_pwl", "bn2", "attn_last", None, _MBCONV),
    "_efficientnet_blocks:InvertedResidual": TailRule("conv_pwl", "bn3", "attn_last", None, _MBCONV),
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
        parts = None if kwargs or len(args) != 1 else _fitting_parts(self, *args)
        if parts is None:
            return super().__call__(*args, **kwargs)
        return _fused_forward(self, parts, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
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
    """Make every block compute plainly again, in place."""
    blocks: list[Any] = [block for block in model.modules() if isinstance(block, FusedBlock)]
    for block in blocks:
        block.__class__ = plain_class(type(block))
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
    return cls.__bases__[1]


def _make(block_cls: type[nn.Module], gates: Any) -> nn.Module:
    """How pickle and copy make a fused block again: its class is not one that can be imported."""
    plain = gated_class(block_cls, gates) if gates else block_cls
    cls = fused_class(plain) or plain
    return cls.__new__(cls)


def _fitting_parts(block: Any, x: object) -> Parts | None:
    """Return the parts of a block's tail if it can be fused now."""
    if type(x) is not Tensor or x.is_meta:
        return None
    if torch.compiler.is_compiling():
        # Exported graphs keep the norms that quantizers and converters look for.
        return None if torch.compiler.is_exporting() else graph_parts(block, block._rule)
    if block._compiled_call_impl is not None or not unwatched() or type(block).forward is not block._plain_forward:
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


def _fused_forward(block: Any, parts: Parts, x: Tensor) -> Tensor:
    u, shortcut = block._halves.head(block, x)
    pooled = _pooled(parts, u)
    z = parts.conv(u)
    adds = getattr(block, "has_skip", True)
    fits = map_fits(z, parts.norm.of_batch) and not (adds and parts.downsample is None and not _alike(z, shortcut))
    if not fits or _for_compilers(z):
        return block._halves.tail(block, z, shortcut)
    weights = _weights(parts, z, adds, pooled)
    if parts.downsample is not None:
        shortcut, norm = _downsampled(parts, shortcut)
        shortcut, weights = shortcut.to(z.dtype), weights._replace(shortcut_norm=norm)
    relu = type(parts.act) is nn.ReLU
    tail = graph_tail if torch.compiler.is_compiling() else fused_tail
    out = tail(z, shortcut if adds else None, weights, relu)
    return out if relu or parts.act is None else parts.act(out)


def _for_compilers(z: Tensor) -> bool:
    """Whether a compiler does better on the plain operations: training on small maps takes less than operators do."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and z.is_cpu and z.numel() < _SMALL


def _alike(z: Tensor, shortcut: Tensor) -> bool:
    return z.shape == shortcut.shape and z.dtype == shortcut.dtype


def _downsampled(parts: Parts, x: Tensor) -> tuple[Tensor, Norm | None]:
    """Return the shortcut, and in inference the norm that it has yet to go through, which the tail does on its way."""
    norm = parts.shortcut_norm
    if norm is None or torch.is_grad_enabled() or norm.of_batch:
        return parts.downsample(x), None
    for layer in list(parts.downsample)[:-1]:
        x = layer(x)
    return x, norm.given()


def _pooled(parts: Parts, u: Tensor) -> Tensor | None:
    """Return the mean of the map that the last convolution is about to make, where it is known by then."""
    return None if torch.is_grad_enabled() or parts.norm.of_batch else pooled_before(parts.conv, u)


def _weights(parts: Parts, z: Tensor, adds: bool, pooled: Tensor | None) -> TailWeights:
    norm = parts.norm
    weight, bias, mean, var, eps = norm.given()
    of_batch = norm.of_batch
    drop = None
    if adds and parts.drop_path is not None and parts.drop_path.training:
        drop = parts.drop_path(z.new_ones((len(z), 1, 1, 1))).flatten(1)  # the same draw as over the map
    moments, running = (None, _running(norm.module)) if of_batch else (Moments(mean, var), None)
    return TailWeights(parts.kernel["weight"], parts.gate, weight, bias, moments, running, drop, eps, pooled=pooled)


def _running(norm: Any) -> Running | None:
    """Return the statistics that batch norm updates, as `torch.nn.BatchNorm2d` decides it, and count the batch."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return None
    factor, count = norm.momentum, norm.num_batches_tracked
    if count is not None:
        count.add_(1)
        if factor is None and torch.compiler.is_compiling():  # a number would break the graph
            factor = 1 / count.to(norm.running_mean.dtype)
        elif factor is None:
            factor = 1 / float(count)
    return Running(norm.running_mean, norm.running_var, 0.0 if factor is None else factor)

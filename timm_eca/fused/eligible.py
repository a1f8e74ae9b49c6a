"""When a block's tail may be computed at once: everything it consists of is what the formula takes it for, now.

Asked at every call, because hooks come and go and modules get replaced. It runs between two convolutions that have
emptied the caches, where a line of Python costs ten times what it costs in a loop; so it is kept to few and plain
lookups. Whoever watches or transforms single operations (hooks, modes, tracers, functorch) gets the plain path.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    DropPath,
    EcaModule,
    FrozenBatchNormAct2d,
    Sigmoid,
    SyncBatchNormAct,
)
from torch import Tensor, nn
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle
from torchvision.ops.misc import FrozenBatchNorm2d

from ..layers import EcaLayer
from .formula import Act
from .halves import NormRule, TailRule
from .norms import InnerNorm, NormPart
from .pooled import commutes, may_pool

__all__ = ["Parts", "adds_shortcut", "find_parts", "is_eca", "map_fits", "transformed", "unwatched"]

_FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
_SIGMOIDS = (nn.Sigmoid, Sigmoid)
_SYNC_NORMS = (nn.SyncBatchNorm, SyncBatchNormAct)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d, *_SYNC_NORMS, *_FROZEN_NORMS)
_CONVS = (nn.Conv2d, Conv2dSame)
_ACTS = {nn.ReLU: Act.RELU, nn.ReLU6: Act.RELU6}
_NOTHING = (type(None), nn.Identity)
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def is_eca(layer: Any) -> bool:
    """Whether a layer is ECA as the paper has it, this package's or timm's."""
    of_timm = type(layer) is EcaModule and layer.act is None and layer.conv2 is None
    if not (of_timm or type(layer) is EcaLayer):
        return False
    return _is_channel_conv(layer.conv) and _is_function(layer.gate)


@dataclass(eq=False)
class Parts:
    """The modules of a block's tail, and what would tell that they are no longer what they were.

    The block itself is not among them: it keeps this, and what keeps itself is freed only when Python looks for that.

    Attributes:
        adds: Whether the shortcut is added.
        conv: The convolution before the norm.
        norm: The norm.
        kernel: The dictionary of the attention's weights.
        gate: The attention's gate; `torch.sigmoid` for any module that is it.
        drop_path: The drop path, None where there is none.
        downsample: What the shortcut goes through, None where it goes unchanged.
        shortcut_norm: The norm that ends the downsample, None where none does.
        act: The activation after the addition, None where there is none.
        relu: Whether that is ReLU.
        short: Whether there is no downsample, and the gate is the one that the compiled passes take.
        pools: Whether the mean of the convolution's map may be worth having from what it gets.
        sums: Whether the last norm before the convolution may have it, by what it makes.
        inner: The norms before that convolution, if each can be computed with its activation, else none.
        norms: Those of them that nobody listens to: all, or none.
        children: Of modules that have any: the dictionary of their children, and who was in it.
        affines: The dictionaries of the norms' weights.
        synced: The norms whose statistics are all processes', if they are in training.
        tail: The tail's modules in the block, of which each may have hooks.
        types: Their classes.
        inside: Those of the norms before, and what is beside them.
        attributes: The modules' own attributes; a forward among them is somebody's patch.
        attention: The attention's own; so are `channel_weights` among them.
        handles: How many handles of hooks had been made, of any module, when there was none on these.
    """

    adds: bool
    conv: Any
    norm: NormPart
    kernel: dict[str, Any]
    gate: Any
    drop_path: Any
    downsample: Any
    shortcut_norm: NormPart | None
    act: Any
    relu: bool
    short: bool = False
    pools: bool = False
    sums: bool = False
    inner: tuple[InnerNorm, ...] = ()
    norms: tuple[InnerNorm, ...] = ()
    children: tuple[tuple[dict[str, Any], list[Any]], ...] = ()
    affines: tuple[dict[str, Any], ...] = ()
    synced: tuple[nn.Module, ...] = ()
    tail: tuple[nn.Module, ...] = ()
    types: tuple[type, ...] = ()
    inside: tuple[nn.Module, ...] = ()
    attributes: tuple[dict[str, Any], ...] = ()
    attention: dict[str, Any] = field(default_factory=dict)
    handles: int = -1

    def still_fit(self, block: nn.Module) -> bool:
        """Whether the same modules are in their places in this block, unheard by any hook, and not patched."""
        if self.children[0][0] is not block._modules:  # a replica took over the original's parts
            return False
        for modules, known in self.children:
            if [*modules.values()] != known:
                return False
        if "weight" not in self.kernel or self.kernel.get("bias") is not None:  # parametrized, or given one
            return False
        if tuple(map(type, self.tail)) != self.types or block.__dict__.get("has_skip", True) is not self.adds:
            return False
        for affine in self.affines:
            if len(affine) < 2:
                return False
        for attributes in (block.__dict__, *self.attributes):
            if "forward" in attributes:
                return False
        if "channel_weights" in self.attention:
            return False
        for norm in self.synced:
            if norm.training:
                return False
        return RemovableHandle.next_id == self.handles or self._unheard(block)

    def _unheard(self, block: nn.Module) -> bool:
        """Look for hooks, after one was registered somewhere."""
        if _has_hooks(block) or any(map(_has_hooks, self.tail)):
            return False
        heard = any(map(_has_hooks, self.inside))
        self.norms = () if heard else self.inner
        self.handles = -1 if heard else RemovableHandle.next_id
        return True


def find_parts(block: Any, rule: TailRule) -> Parts | None:
    """Return the modules of a block's tail if they are what the formula takes them for, else None."""
    conv, norm, attn = (getattr(block, name) for name in (rule.conv, rule.norm, rule.attn))
    drop_path, downsample = block.drop_path, getattr(block, "downsample", None)
    act = getattr(block, rule.act) if rule.act else None
    drops = drop_path is None or type(drop_path) in (DropPath, nn.Identity)
    if type(conv) is not nn.Conv2d or not (is_eca(attn) and _is_batch_norm(norm) and drops):
        return None
    last = _last_norm(downsample)
    shortcut = () if last is None else (downsample, last)
    tail = [m for m in (conv, norm, attn, attn.conv, attn.gate, drop_path, act, *shortcut) if m is not None]
    tail += [child for m in (norm, last) if m is not None for child in m.children()]
    inner, inside = _inner_norms(block, rule)
    between = [m for m in (getattr(block, name) for name in rule.between) if m is not None]
    nothing = all(type(m) in _NOTHING for m in between)
    inside += between if nothing else []
    norms = [_norm_part(m) for m in (norm, last) if m is not None]
    norms += [part.norm for part in inner]
    return Parts(
        adds=adds_shortcut(block, rule),
        conv=conv,
        norm=norms[0],
        kernel=attn.conv._parameters,
        gate=torch.sigmoid if type(attn.gate) in _SIGMOIDS else attn.gate,
        drop_path=drop_path if type(drop_path) is DropPath else None,
        downsample=downsample,
        shortcut_norm=None if last is None else norms[1],
        act=act,
        relu=type(act) is nn.ReLU,
        short=downsample is None and type(attn.gate) in _SIGMOIDS,
        pools=may_pool(conv),
        sums=nothing and commutes(conv),
        inner=inner,
        children=tuple((m._modules, [*m._modules.values()]) for m in (block, *tail, *inside) if m._modules),
        affines=tuple(part.affine for part in norms),
        synced=tuple(part.module for part in norms if type(part.module) in _SYNC_NORMS),
        tail=tuple(tail),
        types=tuple(map(type, tail)),
        inside=tuple(inside),
        attributes=tuple(m.__dict__ for m in (*tail, *inside)),
        attention=attn.__dict__,
    )


def map_fits(z: Tensor, of_batch: bool) -> bool:
    """Whether a map can go through the passes: its type, layout and size."""
    shape = z.shape
    return (
        type(z) is Tensor
        and len(shape) == 4
        and 0 not in shape
        and z.is_floating_point()
        and (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last))
        and not (of_batch and shape.numel() == shape[1])  # batch norm has its own error for a single value
    )


def unwatched() -> bool:
    """Whether nothing records or transforms the single operations that are carried out now."""
    return not (
        _is_tracing()
        or (_len_torch_function_stack() and not _are_default_devices(_get_current_function_mode_stack()))
        or _len_torch_dispatch_stack()
        or transformed()
        or any(_GLOBAL_HOOKS)
    )


def transformed() -> bool:
    """Whether a transform of `torch.func` or a forward-mode derivative is under way."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _are_default_devices(modes: list[Any]) -> bool:
    """Whether modes do nothing but choose where new tensors are made, as `torch.set_default_device` has it."""
    return all(type(mode) is DeviceContext for mode in modes)


def adds_shortcut(block: Any, rule: TailRule) -> bool:
    """Whether a block adds its shortcut: inverted residuals do where the map keeps its shape."""
    return block.has_skip if "has_skip" in rule.rest else True


def _is_channel_conv(conv: object) -> bool:
    return (
        type(conv) is nn.Conv1d
        and conv.weight.shape[:2] == (1, 1)
        and conv.bias is None
        and conv.padding == (conv.kernel_size[0] // 2,)
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1,)
    )


def _is_function(gate: nn.Module) -> bool:
    """Whether a gate is a function of its input alone: a backward pass evaluates it again."""
    known = type(gate).__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations"))
    return known and type(gate) is not nn.RReLU and not any(True for _ in gate.parameters())


def _is_batch_norm(norm: Any, acts: Container[type] = _NOTHING) -> bool:
    """Whether a module is batch norm and, where it has an activation, one of those."""
    return (
        type(norm) in _NORMS
        and type(getattr(norm, "act", None)) in acts
        and type(getattr(norm, "drop", None)) in _NOTHING
    )


def _inner_norms(block: Any, rule: TailRule) -> tuple[tuple[InnerNorm, ...], list[nn.Module]]:
    """Return the norms before the last convolution, none unless all can be computed with their activations.

    Second, all modules that are involved.
    """
    norms, involved = [], []
    for norm in rule.inner:
        try:
            modules = [block.get_submodule(path) for path in norm if path is not None]
        except AttributeError:
            return (), []
        made = _inner_norm(norm, *modules)
        if made is None:
            return (), []
        norms.append(made)
        involved += modules
    return tuple(norms), involved


def _inner_norm(rule: NormRule, conv: Any, norm: Any, *rest: Any) -> InnerNorm | None:
    *nothing, act = rest
    is_norm = _is_batch_norm(norm, _ACTS if rule.is_own else _NOTHING)
    if not (is_norm and type(conv) in _CONVS and type(act) in _ACTS and all(type(m) in _NOTHING for m in nothing)):
        return None
    return InnerNorm(_norm_part(norm), _ACTS[type(act)], (norm,) if rule.is_own else (norm, *rest))


def _last_norm(downsample: Any) -> Any:
    """Return the norm that ends a downsample, None where it is not a sequence that ends with one."""
    norm = downsample[-1] if type(downsample) is nn.Sequential and len(downsample) else None
    return norm if _is_batch_norm(norm) else None


def _norm_part(norm: Any) -> NormPart:
    frozen = type(norm) in _FROZEN_NORMS
    return NormPart(norm, frozen, norm._buffers if frozen else norm._parameters, norm._buffers)


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)

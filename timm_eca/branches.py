"""What a block's weights tell: widths, and which tensors scale the end of its branch. Reads only."""

import itertools
from collections.abc import Iterator
from functools import reduce

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from .block_rule import BlockRule

__all__ = [
    "has_scalable",
    "lookup",
    "output_channels",
    "resolve",
    "scaling_tensors",
    "squeeze_channels",
    "tensor_key",
    "tensor_near",
]


def lookup(module: nn.Module, path: str) -> object:
    """Return what is at an attribute path, None where it ends early. A negative number counts from a list's end."""

    def step(current, name):
        if name.lstrip("-").isdigit() and isinstance(current, (nn.Sequential, nn.ModuleList)):
            children = list(current.children())
            return children[int(name)] if -len(children) <= int(name) < len(children) else None
        return getattr(current, name, None)

    return reduce(step, path.split("."), module)


def resolve(module: nn.Module, path: str) -> str:
    """Return a path with negative numbers replaced by the modules' names."""
    parts: list[str] = []
    for name in path.split("."):
        parent = module.get_submodule(".".join(parts))
        parts.append(list(dict(parent.named_children()))[int(name)] if name.startswith("-") else name)
    return ".".join(parts)


def output_channels(module: nn.Module, path: str) -> int:
    """Return the output channels of the convolution, linear layer or norm at a path.

    A norm that has nothing to tell them by is as wide as what comes before it.
    """
    found = module.get_submodule(resolve(module, path))
    width = _width(found, "out_channels", "out_features", "num_features", "num_channels")
    if width is None and getattr(found, "weight", None) is not None:
        width = len(getattr(found, "weight"))  # noqa: B009
    width = _width_before(module, found) if width is None else width
    if width is None:
        raise ValueError(f"Nothing tells how wide {path} of {type(module).__name__} is: it has no weights.")
    return width


def _width(module: nn.Module, *attributes: str) -> int | None:
    return next((int(getattr(module, name)) for name in attributes if hasattr(module, name)), None)


def tensor_key(model: nn.Module, path: str) -> str | None:
    """Return the key in a model's state dict of the weight of a module.

    Of a module without weight it is another tensor's, or one of the nearest parent that has any; None: there is none.
    """
    module = lookup(model, path) if path else model
    tensors = module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else {}
    floating = {name: t for name, t in tensors.items() if torch.is_tensor(t) and t.is_floating_point()}
    names = sorted(floating, key=lambda name: not isinstance(floating[name], nn.Parameter))  # a gain is a buffer
    if names:
        return f"{path}.{'weight' if 'weight' in names else names[0]}".lstrip(".")
    return tensor_key(model, path.rpartition(".")[0]) if path else None


def tensor_near(model: nn.Module, path: str) -> torch.Tensor:
    """Return the tensor that `tensor_key` names: what comes next to it is to be on its device and of its type."""
    owner, _, name = (tensor_key(model, path) or "").rpartition(".")
    return getattr(model.get_submodule(owner), name) if name else torch.empty(0)


def _width_before(module: nn.Module, found: nn.Module) -> int | None:
    """The output channels of the last convolution or linear layer before a child, in the order of registration."""
    before = itertools.takewhile(lambda child: child is not found, module.modules())
    widths = [_width(child, "out_channels", "out_features") for child in before]
    return next((width for width in reversed(widths) if width is not None), None)


def squeeze_channels(block: nn.Module, name: str) -> int | None:
    """Return the channels that a squeeze-and-excitation module in a block takes, None if nothing tells.

    Its first convolution tells; ECA and others have none over channels: they take what comes before them.
    """
    module = block.get_submodule(name)
    first = next((m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    return _width_before(block, module) if first is None else first.weight.shape[1] * getattr(first, "groups", 1)


def scaling_tensors(block: nn.Module, rule: BlockRule, kept: str | None = None) -> list[str]:
    """Return the tensors that scale the end of a branch linearly, `/` before those that do so inversely.

    Args:
        block: The block.
        rule: Its row.
        kept: Path of a squeeze-and-excitation module through which the branch passes after these tensors: its gates
            stay as they are if its first weight shrinks as its input grows.
    """
    tensors = []
    for entry in rule.width if rule.scale is None else rule.scale:
        sign = "/" if entry.startswith("/") else ""
        tensors += [sign + tensor for tensor in _tensors(block, entry.lstrip("/"))]
    return tensors + ([f"/{kept}.{_first_weight(block, kept)}"] if kept else [])


def _tensors(block: nn.Module, name: str) -> Iterator[str]:
    head, star, tail = name.partition(".*")
    if star:
        many = lookup(block, head)
        for index in range(len(many)) if isinstance(many, (nn.ModuleList, nn.Sequential)) else ():
            yield from _tensors(block, f"{head}.{index}{tail}")
        return
    found = lookup(block, name)
    if isinstance(found, nn.Module):
        resolved = resolve(block, name)
        yield from (f"{resolved}.{n}" for n in ("weight", "bias") if getattr(found, n, None) is not None)
    elif found is not None:
        yield name


def _first_weight(block: nn.Module, kept: str) -> str | None:
    names = ("fc1.weight", "fc.weight", "conv.weight")
    return next((name for name in names if lookup(block, f"{kept}.{name}") is not None), None)


_FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)  # what timm.utils.freeze makes of norms: weights as buffers
_LINEAR = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.Conv2d, nn.Linear, *_FROZEN)
_HOMOGENEOUS = (nn.Identity, nn.ReLU, nn.LeakyReLU)


def has_scalable(block: nn.Module, rule: BlockRule, kept: str | None = None) -> bool:
    """Whether twice the scaling tensors give exactly twice the end of the branch."""
    if kept is not None and _first_weight(block, kept) is None:
        return False
    every = scaling_tensors(block, rule, kept)
    tensors = [t for t in every if not t.startswith("/")]
    owners = {t.rpartition(".")[0] for t in tensors}
    return (
        bool(tensors)
        and all(_is_held(block, t.lstrip("/")) for t in every)
        and all(_is_scalable(block, rule, owner) for owner in owners)
    )


def _is_held(block: nn.Module, path: str) -> bool:
    """Whether a tensor is the module's own: one computed from others, by a weight norm, loses what is written."""
    owner, _, name = path.rpartition(".")
    module = block.get_submodule(owner)
    return name in module._parameters or name in module._buffers


def _is_scalable(block: nn.Module, rule: BlockRule, path: str) -> bool:
    module = block.get_submodule(path)
    if f"{path}.gain" in (rule.scale or ()):  # a standardised convolution's weight does not scale it, its gain does
        return True
    linear = isinstance(module, _LINEAR) and "StdConv" not in type(module).__name__
    parent = block.get_submodule(path.rpartition(".")[0])
    acts = [getattr(owner, "act", None) for owner in (module, parent) if owner is not block]
    return linear and all(act is None or isinstance(act, _HOMOGENEOUS) for act in acts)

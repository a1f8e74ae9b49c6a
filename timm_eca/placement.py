"""Where attention goes: rules from block classes to places, and the sites they give in one model.

The second of the three forms (spec, sites, model). Rules know blocks, not attention classes; planning only reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from .spec import AttnSpec

__all__ = ["BLOCK_RULES", "FAMILIES", "BlockRule", "Site", "find_sites"]

EXAMPLES = ("resnet50", "resnext50_32x4d", "mobilenetv2_100")


class BlockRule(NamedTuple):
    """Where a block's residual branch ends; all paths are relative to the block.

    Attributes:
        conv: Last convolution of the branch; its output channels are the layer's.
        norm: Norm after it, whose output the layer gates.
        slot: Attribute that the block calls right after the norm, empty in a plain block: here the layer goes.
        inner: Attribute that may hold squeeze-and-excitation inside the branch.
    """

    conv: str
    norm: str
    slot: str
    inner: str | None = None


# In a ResNet the slot `se` is called after the last norm. EfficientNet-style blocks have their `se` inside the
# branch; their last norm carries an activation, an identity at the end of a branch, which is called after it.
BLOCK_RULES: dict[type[nn.Module], BlockRule] = {
    BasicBlock: BlockRule(conv="conv2", norm="bn2", slot="se"),
    Bottleneck: BlockRule(conv="conv3", norm="bn3", slot="se"),
    DepthwiseSeparableConv: BlockRule(conv="conv_pw", norm="bn2", slot="bn2.act", inner="se"),
    InvertedResidual: BlockRule(conv="conv_pwl", norm="bn3", slot="bn3.act", inner="se"),
}

Stages = list[tuple[str, nn.Module]]


def _resnet_stages(model: nn.Module) -> Stages:
    return [(name, child) for name, child in model.named_children() if name.startswith("layer")]


def _efficientnet_stages(model: nn.Module) -> Stages:
    return [(f"blocks.{i}", stage) for i, stage in enumerate(model.get_submodule("blocks").children())]


FAMILIES: dict[type[nn.Module], Callable[[nn.Module], Stages]] = {
    ResNet: _resnet_stages,
    EfficientNet: _efficientnet_stages,
    EfficientNetFeatures: _efficientnet_stages,
}


@dataclass(frozen=True)
class Site:
    """One place for one layer in one model.

    Attributes:
        path: Module path at which the layer goes.
        stage: Number of the stage, the first being 1.
        channels: Channels of the tensor that the layer gates.
        conv: Path of the convolution that makes this tensor; the layer takes its device and dtype.
        norm: Path of the norm after it; its weight and bias scale the tensor.
        replaces: Class name of the module that gives way to the layer, None for an empty slot.
    """

    path: str
    stage: int
    channels: int
    conv: str
    norm: str
    replaces: str | None = None


def find_sites(model: nn.Module, spec: AttnSpec, name: str | None = None) -> list[Site]:
    """Return the sites of a spec in a model, in the order of execution. Reads only.

    Args:
        model: A timm model.
        spec: What to place.
        name: The model's name for messages; by default the one in its `pretrained_cfg`.

    Raises:
        ValueError: If the model's family or a block has no rule, the spec does not fit its stages, or a slot is
            in use.
    """
    stages = _stages_of(model, name)
    _check_stages(spec, len(stages))
    wanted = spec.attn_stages or range(1, len(stages) + 1)
    sites = [site for number in wanted for site in _stage_sites(number, *stages[number - 1])]
    if not sites:
        raise ValueError(f"No block of {type(model).__name__} takes attention in stages {tuple(wanted)}.")
    return sites


def _stages_of(model: nn.Module, name: str | None) -> Stages:
    family = FAMILIES.get(type(model))
    stages = family(model) if family else []
    reason = _why_not(stages) if family else f"its class {type(model).__name__} has no rule"
    if reason:
        name = name or (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "this model"
        raise ValueError(
            f"{name} has no place for channel attention: {reason}. Models that take it: {', '.join(EXAMPLES)}."
        )
    return stages


def _why_not(stages: Stages) -> str | None:
    blocks = [(f"{prefix}.{name}", block) for prefix, stage in stages for name, block in stage.named_children()]
    unknown = {type(block) for _, block in blocks} - BLOCK_RULES.keys()
    if unknown:
        return f"its blocks of class {', '.join(sorted(cls.__name__ for cls in unknown))} have no rule"
    for path, block in blocks:
        inner = BLOCK_RULES[type(block)].inner
        if inner and not isinstance(getattr(block, inner), nn.Identity):
            return f"{path}.{inner}, {type(getattr(block, inner)).__name__} inside the branch, has no rule"
    return None


def _check_stages(spec: AttnSpec, count: int) -> None:
    outside = [n for n in spec.attn_stages or () if not 1 <= n <= count]
    if outside:
        raise ValueError(f"attn_stages must be in range [1, {count}], got {spec.attn_stages}.")
    if isinstance(spec.attn_kwargs, tuple) and len(spec.attn_kwargs) != count:
        raise ValueError(
            f"attn_kwargs must be one mapping, or {count}, one per stage, got {len(spec.attn_kwargs)} mappings."
        )


def _stage_sites(number: int, prefix: str, stage: nn.Module) -> Iterator[Site]:
    for name, block in stage.named_children():
        rule = BLOCK_RULES[type(block)]
        path = f"{prefix}.{name}"
        yield Site(
            path=f"{path}.{rule.slot}",
            stage=number,
            channels=block.get_submodule(rule.conv).out_channels,  # type: ignore[arg-type]
            conv=f"{path}.{rule.conv}",
            norm=f"{path}.{rule.norm}",
            replaces=_occupant(path, block, rule),
        )


def _occupant(path: str, block: nn.Module, rule: BlockRule) -> str | None:
    parent_path, _, name = rule.slot.rpartition(".")
    parent = block.get_submodule(parent_path)
    if not hasattr(parent, name):
        raise ValueError(f"{path}.{parent_path} is a {type(parent).__name__}, which has no place for a layer after it.")
    occupant = getattr(parent, name)
    if occupant is None or isinstance(occupant, nn.Identity):
        return None
    if parent_path:  # an activation must stay; what a block calls `se` may go
        raise ValueError(f"{path}.{rule.slot} holds {type(occupant).__name__}, which attention must not replace.")
    return type(occupant).__name__

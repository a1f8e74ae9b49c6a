"""Where attention goes in one model: the table of blocks applied to its modules.

Rules know blocks, not attention classes; planning only reads.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from .block_rule import BlockRule, rule_key
from .blocks import BLOCKS
from .branches import has_scalable, lookup, output_channels, resolve, scaling_tensors, squeeze_channels
from .gating import Gate
from .sites import Site, family_of
from .spec import AttnSpec
from .stages import stage_number, stage_sites

__all__ = ["EXAMPLES", "find_sites", "placed_by_timm", "placed_site", "rules_of"]

EXAMPLES = ("resnet50", "mobilenetv2_100", "convnext_tiny")


def find_sites(model: nn.Module, spec: AttnSpec, name: str | None = None) -> list[Site]:
    """Return the sites of a spec in a model, in the order of execution. Reads only.

    Args:
        model: A timm model.
        spec: What to place.
        name: The model's name for messages; by default the one in its `pretrained_cfg`.

    Raises:
        ValueError: If the model has no place for attention or the spec does not fit its stages.
    """
    where = "end" if spec.attn_where == "stage" else spec.attn_where
    sites = [site for path, module in model.named_modules() for site in _block_sites(model, path, module, where)]
    sites = [site for site in sites if site.channels > 1]  # one channel has no others to be weighed against
    if not sites:
        name = name or (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "this model"
        raise ValueError(
            f"{name} has no place for channel attention: {type(model).__name__} has no convolutional block that is"
            f" known. Models that take it: {', '.join(EXAMPLES)}."
        )
    if spec.attn_where == "stage":
        sites = stage_sites(model, sites)
    _check_stages(spec, sites)
    return [site for site in sites if spec.attn_stages is None or site.stage in spec.attn_stages]


def placed_by_timm(model_cls: Any) -> bool:
    """Whether a model class's own configuration has `attn_layer`, and its constructor places the layer."""
    cfg = inspect.signature(model_cls).parameters.get("cfg") if isinstance(model_cls, type) else None
    fields = dataclasses.fields(cfg.annotation) if cfg and dataclasses.is_dataclass(cfg.annotation) else ()
    return {"attn_layer", "attn_kwargs"} <= {field.name for field in fields}


def placed_site(model: nn.Module, path: str, channels: int) -> Site:
    """Return the site of a layer that a model's own constructor placed."""
    return Site(path=path, stage=stage_number(model, path), channels=channels, like=path)


def _check_stages(spec: AttnSpec, sites: list[Site]) -> None:
    numbers = sorted({site.stage for site in sites})
    if set(spec.attn_stages or ()) - set(numbers):
        raise ValueError(f"attn_stages must be among {', '.join(map(str, numbers))}, got {spec.attn_stages}.")
    if isinstance(spec.attn_kwargs, tuple) and len(spec.attn_kwargs) != numbers[-1]:
        raise ValueError(
            f"attn_kwargs must be one mapping, or {numbers[-1]}, one per stage, got {len(spec.attn_kwargs)} mappings."
        )


def rules_of(model: nn.Module, block: nn.Module, where: str) -> list[BlockRule]:
    """Return the rows that hold for a block under a placement: for each of its children the first."""
    family = family_of(model)
    held: dict[str, BlockRule] = {}
    for rule in BLOCKS.get(rule_key(type(block)), ()):
        if where not in rule.where or rule.family not in (None, family):
            continue
        if rule.when is None or _truth(lookup(block, rule.when)):
            held.setdefault(rule.child, rule)
    return list(held.values())


def _truth(value: object) -> bool:
    return value is not None and value is not False


def _block_sites(model: nn.Module, path: str, block: nn.Module, where: str) -> Iterator[Site]:
    for rule in rules_of(model, block, where):
        stage = stage_number(model, path)
        inner = [name for name in rule.se if _occupied(block, name)]
        if inner and where == "auto":
            yield _site_of_se(path, block, rule, stage, inner[0])
        elif rule.slot is not None and not (_occupied(block, rule.slot) and where == "add"):
            yield _site_in_slot(path, block, rule, stage, inner if where == "end" else [])
        else:
            yield _site_of_gate(model, path, block, rule, stage, inner if where == "end" else [])


def _site_of_se(path: str, block: nn.Module, rule: BlockRule, stage: int, name: str) -> Site:
    """The place of squeeze-and-excitation inside the branch."""
    module = block.get_submodule(name)
    return Site(
        path=f"{path}.{name}",
        stage=stage,
        channels=squeeze_channels(block, name) or sum(output_channels(block, n) for n in rule.width),
        like=f"{path}.{resolve(block, rule.width[0])}",
        replaces=type(module).__name__,
    )


def _site_in_slot(path: str, block: nn.Module, rule: BlockRule, stage: int, removed: list[str]) -> Site:
    """The attribute that the block calls at the end of its branch."""
    occupied = _occupied(block, str(rule.slot))
    return Site(
        path=f"{path}.{rule.slot}",
        stage=stage,
        channels=sum(output_channels(block, name) for name in rule.width),
        like=f"{path}.{resolve(block, rule.width[0])}",
        scales=tuple(f"{path}.{tensor}" for tensor in scaling_tensors(block, rule))
        if has_scalable(block, rule)
        else (),
        replaces=type(block.get_submodule(str(rule.slot))).__name__ if occupied else None,
        removes=tuple(f"{path}.{name}" for name in removed),
    )


def _site_of_gate(
    model: nn.Module, path: str, block: nn.Module, rule: BlockRule, stage: int, removed: list[str]
) -> Site:
    """A new child at the end of the branch, behind what the slot holds where there is one."""
    kept = rule.slot if rule.slot and _occupied(block, rule.slot) else None
    tensors = scaling_tensors(block, rule, kept) if has_scalable(block, rule, kept) else []
    gate = Gate(
        rule.child,
        str(rule.keep) if kept else rule.gate,
        "NHWC" if rule.nhwc else "NCHW",
        gain=not tensors,
    )
    source = _convolution_before(model, path) if rule.width == ("<",) else None
    return Site(
        path=f"{path}.{rule.child}",
        stage=stage,
        channels=output_channels(model, source) if source else sum(output_channels(block, n) for n in rule.width),
        like=source or f"{path}.{resolve(block, rule.width[0])}",
        scales=tuple(f"/{path}.{t[1:]}" if t.startswith("/") else f"{path}.{t}" for t in tensors),
        block=path,
        gate=gate,
        removes=tuple(f"{path}.{name}" for name in removed),
    )


def _occupied(block: nn.Module, path: str) -> bool:
    module = lookup(block, path)
    return module is not None and not isinstance(module, nn.Identity)


def _convolution_before(model: nn.Module, path: str) -> str:
    parent_path, _, name = path.rpartition(".")
    last = ""
    for sibling, module in model.get_submodule(parent_path).named_children():
        if sibling == name:
            break
        last = sibling if isinstance(module, nn.Conv2d) else last
    return f"{parent_path}.{last}"

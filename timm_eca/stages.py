"""Where the stages of a model end: at the modules that give its features, as timm's `feature_info` names them.

The stem's feature, before the first block, is none of a stage. A feature taken inside a block, as in Xception and
NASNet, is of the stage that ends with the block before. Models whose features are tokens of a transformer, and those
in `BY_CONTAINER`, have a stage in each of the numbered containers that hold blocks.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from .block_rule import rule_key
from .blocks import BLOCKS
from .branches import lookup, resolve
from .gating import RETURN, Gate
from .sites import Site, family_of

__all__ = ["numbered", "stage_number", "stage_sites"]

STAGE_NUMBERS = {
    "inception_resnet_v2": {"repeat": 1, "repeat_1": 2, "repeat_2": 3, "block8": 3},
    "mobilenetv5": {"msfa": 4},  # joins the last stages
    "nasnet": {"reduction_cell_0": 7, "reduction_cell_1": 13},  # each leads to the cell of that number
}
"""Numbers of stages whose names do not tell, by module and name."""

BY_CONTAINER = frozenset(("vgg",))
"""Modules where a feature is taken right before the block that ends its stage: VGG's, before the pooling."""

ENDS = {
    "densenet": {"features.norm5": "features.denseblock4"},
    "efficientvim": {f"stages.{i}": f"stages.{i}.blocks.-1" for i in range(3)},
    "hrnet": {f"stage{i + 1}": f"incre_modules.{i}" for i in range(4)},
}
"""What ends a stage where it is not the module that `feature_info` names, by timm's module and that name."""

_XCEPTION = "{self._residual(self.stack(x), x)} | forward_with_tap: {self._residual(m(x_tap), x)}"
RETURNS = {
    "efficientvim:EfficientViMBlock": "{x}, h",
    "selecsls:SelecSlsBlock": BLOCKS["selecsls:SelecSlsBlock"][0].gate,
    "xception_aligned:PreXceptionModule": _XCEPTION,
    "xception_aligned:XceptionModule": _XCEPTION,
}
"""Expressions for classes that return more than the feature, of forward or of another method."""

SEQUENCES = frozenset(("container:Sequential", "regnet:RegStage"))
"""Classes whose forward calls their children one after the other, so also one that is appended."""

HOLDERS = {"densenet:DenseBlock": "denselayer1"}
"""The child that holds the layer for a class which passes something else than one tensor to all its children."""


class StageEnd(NamedTuple):
    """The module that ends a stage, and the channels of what it returns."""

    path: str
    channels: int


def stage_sites(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Return one site at the end of each stage, numbered in their order.

    Args:
        model: A timm model.
        sites: Its sites at the ends of branches, in the order of execution.

    Raises:
        ValueError: If a stage gives no single tensor.
    """
    ends = [] if family_of(model) in BY_CONTAINER else _ends_by_features(model, sites)
    ends = ends or _ends_by_container(model, sites)
    return [_site(model, end, number, sites) for number, end in enumerate(ends, 1)]


def _ends_by_features(model: nn.Module, sites: Sequence[Site]) -> list[StageEnd]:
    """Ends as `feature_info` has them; none if no feature is taken from a module of blocks, or inside a block."""
    taps = _taps(model)
    blocks = {_block(site): site.channels for site in sites}
    holding = {tap for tap in taps if any(site.path.startswith(f"{tap}.") for site in sites)}
    inside = {tap: _block_before(tap, list(blocks)) for tap in taps.keys() - holding if _is_inside(tap, blocks)}
    if not holding and not any(inside.values()):
        return []
    order = [path for path, _ in model.named_modules()]
    after_stem = set(order[order.index(next(iter(blocks))) :])
    kinds = {_kind(model, tap) for tap in holding if "." in tap}  # a first stage may be of plain convolutions
    ends = []
    for tap, channels in taps.items():
        if tap in inside:
            before = inside[tap]
            ends += [StageEnd(before, blocks[before])] if before else []
        elif tap in holding or tap in after_stem or _kind(model, tap) in kinds:
            ends.append(StageEnd(tap, channels))
    return ends


def _is_inside(tap: str, blocks: Iterable[str]) -> bool:
    return any(tap.startswith(f"{block}.") for block in blocks)


def _block_before(tap: str, blocks: list[str]) -> str | None:
    """The block before the one that a feature is taken in."""
    index = next(i for i, block in enumerate(blocks) if tap.startswith(f"{block}."))
    return blocks[index - 1] if index else None


def _kind(model: nn.Module, path: str) -> tuple[str, type]:
    """What tells a stage from a stem: the list it is in, and its class."""
    return path.rpartition(".")[0], type(model.get_submodule(path))


def _taps(model: nn.Module) -> dict[str, int]:
    """Modules that give features and their channels, without those of a stem so named."""
    info = getattr(model, "feature_info", None) or []
    exceptions = ENDS.get(family_of(model), {})
    taps = {}
    for feature in getattr(info, "info", info):
        named = feature["module"]
        tap = exceptions.get(named, named)
        if lookup(model, tap) is None and named in exceptions:
            raise ValueError(
                f"attn_where='stage' does not fit this {type(model).__name__}: without {tap} its {named} gives no"
                " single tensor. Accepted: 'auto', 'end', 'add'."
            )
        if tap.split(".")[0] not in ("", "stem") and lookup(model, tap) is not None:
            taps[resolve(model, tap)] = int(feature["num_chs"])
    return taps


def _ends_by_container(model: nn.Module, sites: Sequence[Site]) -> list[StageEnd]:
    """The numbered containers that hold blocks, as wide as their last."""
    ends = {}
    for site in sites:
        path = ".".join(site.path.split(".")[: (numbered(site.path) or 0) + 1])
        ends[stage_number(model, site.path)] = StageEnd(path, site.channels)
    return [end for _, end in sorted(ends.items())]


def _site(model: nn.Module, end: StageEnd, number: int, sites: Sequence[Site]) -> Site:
    container = model.get_submodule(end.path)
    inside = [site for site in sites if site.path.startswith(f"{end.path}.")]
    key = rule_key(type(container))
    child = f"{HOLDERS[key]}.attn_stage" if key in HOLDERS else "attn_stage"
    gate = None
    if key not in SEQUENCES:
        gate = Gate(child, RETURNS.get(key, RETURN), _layout(model, container), gain=True)
    return Site(
        path=f"{end.path}.{child}",
        stage=number,
        channels=end.channels,
        like=(inside or sites)[-1].like,
        block=None if gate is None else end.path,
        gate=gate,
    )


def _layout(model: nn.Module, container: nn.Module) -> str:
    if any(type(module).__name__ == "Flat" for module in container.modules()):
        return "tokens"  # efficientformer's last stage
    return getattr(model, "output_fmt", "NCHW")


def _block(site: Site) -> str:
    return site.block or site.path.rpartition(".")[0]


def numbered(path: str) -> int | None:
    """Return the index of the first part of a module path that has a digit."""
    return next((i for i, part in enumerate(path.split(".")) if re.search(r"\d", part)), None)


def stage_number(model: nn.Module, path: str) -> int:
    """Number a block's stage by its path: `layer1`, `blocks.0` and `stages.0` are the first, and a stem is of that.

    A name with `_0` among its siblings counts from zero: NASNet's `cell_0`, and `stages_0` of a network for features.
    """
    parts = path.split(".")
    named = STAGE_NUMBERS.get(family_of(model), {}).get(parts[0])
    index = numbered(path)
    if named is not None or index is None:
        return named or 1
    *parents, name = parts[: index + 1]
    if "stem" in re.split("[._]", ".".join((*parents, name))):
        return 1
    last = re.fullmatch(r"(|.*_)(\d+)", name)
    if last and (last[1] == "" or hasattr(model.get_submodule(".".join(parents)), f"{last[1]}0")):
        return int(last[2]) + 1
    return max(int(re.findall(r"\d+", name)[0]), 1)

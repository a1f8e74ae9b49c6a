"""What attention a model is to carry: the first of the three forms (spec, sites, model)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .layers.registry import AttnLayer, get_attn

__all__ = ["ATTN_ARGS", "INITS", "PLACEMENTS", "AttnSpec"]

PLACEMENTS = ("auto", "end", "add", "stage")
INITS = ("default", "identity")


@dataclass(frozen=True)
class AttnSpec:
    """What to place: which layer, with which arguments, in which stages, where in a block, starting how.

    The fields are the keywords that `timm.create_model`, `plan_attn` and `add_attn_` take.

    Attributes:
        attn_layer: Registered name, or a class, partial or function whose first argument is `channels`.
        attn_kwargs: Keyword arguments of the layer; a sequence of such mappings gives one to each stage.
        attn_stages: Numbers of the stages that carry the layer, the first stage being 1. None: all.
        attn_where: 'auto': where the paper puts it, in place of squeeze-and-excitation where a block carries it.
            'end': at the end of the residual branch, right before the addition; squeeze-and-excitation goes.
            'add': the same, and squeeze-and-excitation stays. 'stage': once, at the end of each of timm's feature
            stages; these are then the stages that are counted.
        attn_init: 'default': the layer's own. 'identity': the model computes what it computed without the layer.
    """

    attn_layer: str | AttnLayer
    attn_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    attn_stages: Sequence[int] | None = None
    attn_where: str = "auto"
    attn_init: str = "default"

    def __post_init__(self):
        get_attn(self.attn_layer)
        object.__setattr__(self, "attn_kwargs", _normal_kwargs(self.attn_kwargs))
        object.__setattr__(self, "attn_stages", _normal_stages(self.attn_stages))
        _one_of("attn_where", self.attn_where, PLACEMENTS)
        _one_of("attn_init", self.attn_init, INITS)

    @property
    def name(self) -> str:
        """The layer's name for messages."""
        return self.attn_layer if isinstance(self.attn_layer, str) else getattr(self.attn_layer, "__name__", "layer")

    def kwargs_of(self, index: int) -> dict[str, Any]:
        """Return the layer's keyword arguments in the index-th stage, counted from 0."""
        per_stage = not isinstance(self.attn_kwargs, Mapping)
        return dict(self.attn_kwargs[index] if per_stage else self.attn_kwargs)  # type: ignore[index,arg-type]

    def as_args(self) -> dict[str, Any]:
        """Return the keywords of `timm.create_model` that differ from their defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)} | {"attn_kwargs": {}}
        return {k: v for k, v in values.items() if v != defaults[k]}


ATTN_ARGS = tuple(f.name for f in fields(AttnSpec))


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}.")


def _normal_kwargs(kwargs: Any) -> dict[str, Any] | tuple[dict[str, Any], ...]:
    if kwargs is None:
        return {}
    if isinstance(kwargs, Mapping):
        return dict(kwargs)
    if isinstance(kwargs, Sequence) and not isinstance(kwargs, str) and all(isinstance(k, Mapping) for k in kwargs):
        return tuple(dict(k) for k in kwargs)
    raise ValueError(f"attn_kwargs must be a mapping, or a sequence of mappings, one per stage, got {kwargs!r}.")


def _normal_stages(stages: Any) -> tuple[int, ...] | None:
    if stages is None:
        return None
    if isinstance(stages, int) and not isinstance(stages, bool):
        stages = (stages,)
    numbers = tuple(stages) if isinstance(stages, Iterable) and not isinstance(stages, str) else ()
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"attn_stages must be stage numbers such as (3, 4), got {stages!r}.")
    return tuple(sorted(set(numbers)))

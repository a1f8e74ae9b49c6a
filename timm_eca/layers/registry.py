"""The registry of attention layers: names to classes, filled by a decorator or by other packages' entry points."""

import difflib
import functools
import logging
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from torch import nn

__all__ = ["ENTRY_POINT_GROUP", "AttnLayer", "get_attn", "list_attns", "register_attn", "unknown_attn"]

_logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "timm_eca.attn"

AttnLayer = Callable[..., nn.Module]
"""What the registry holds: a class, partial or function whose first argument is `channels`."""

_LayerT = TypeVar("_LayerT", bound=AttnLayer)

_layers: dict[str, AttnLayer] = {}


@overload
def register_attn(name: str, layer: None = None, *, override: bool = False) -> Callable[[_LayerT], _LayerT]: ...
@overload
def register_attn(name: str, layer: _LayerT, *, override: bool = False) -> _LayerT: ...
def register_attn(name: str, layer: Any = None, *, override: bool = False) -> Any:
    """Register an attention layer under a name; a decorator where no layer is given.

    Args:
        name: Name for `attn_layer=` and `timm.layers.create_attn`, case-insensitive.
        layer: Class, partial or function whose first argument is `channels`.
        override: Replace a layer already registered under this name.

    Raises:
        ValueError: If the name is taken and override is False, or name or layer is not of the right kind.
    """
    if layer is None:
        return functools.partial(register_attn, name, override=override)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"An attention layer's name must be a non-empty string, got {name!r}.")
    if not callable(layer) or isinstance(layer, nn.Module):
        raise ValueError(
            f"An attention layer must be a class, partial or function that takes `channels` first, got {layer!r}."
        )
    key = name.lower()
    taken = _layers.get(key)
    if taken is not None and not override and not _same_definition(taken, layer):
        raise ValueError(f"Attention layer {name!r} is already registered as {taken!r}; pass override=True to replace.")
    _layers[key] = layer
    return layer


def _same_definition(a: AttnLayer, b: AttnLayer) -> bool:
    """Whether b is a again, made by executing the defining module once more (a reload)."""
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):
        return (a.args, a.keywords) == (b.args, b.keywords) and _same_definition(a.func, b.func)
    origins = [f"{getattr(x, '__module__', '?')}.{getattr(x, '__qualname__', '?')}" for x in (a, b)]
    return origins[0] == origins[1] and not re.search(r"[?<]|^__main__", origins[0])


def get_attn(layer: str | AttnLayer) -> AttnLayer:
    """Return the attention layer of a name; a class or another callable is returned as it is.

    Raises:
        ValueError: If the name is unknown (with close matches and all names), or layer is neither.
    """
    if isinstance(layer, str):
        found = _layers.get(layer.lower()) or _from_entry_point(layer.lower())
        if found is None:
            raise unknown_attn(layer)
        return found
    if not callable(layer) or isinstance(layer, nn.Module):
        raise ValueError(f"An attention layer must be a name, class, partial or function, got {layer!r}.")
    return layer


def list_attns() -> list[str]:
    """Return the names of all attention layers, sorted, those of other packages' entry points included."""
    return sorted({*_layers, *_entry_points()})


def unknown_attn(name: str) -> ValueError:
    """Return the error for a name that is not registered."""
    names = list_attns()
    close = difflib.get_close_matches(name.lower(), names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"Unknown attention layer {name!r}.{hint} Registered: {', '.join(names)}.")


@functools.cache
def _entry_points() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        key = point.name.lower()
        if key in _layers or key in found:
            _logger.warning("Ignoring entry point %s = %s: the name is taken.", point.name, point.value)
        else:
            found[key] = point
    return found


def _from_entry_point(key: str) -> AttnLayer | None:
    point = _entry_points().get(key)
    if point is None:
        return None
    try:
        return register_attn(key, point.load())
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Attention layer {key!r} of entry point {point.name} = {point.value}: {error}.") from error

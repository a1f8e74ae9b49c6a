"""One layer made from a spec, and what its weights are called."""

import functools
import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from .layers.registry import AttnLayer, get_attn
from .spec import AttnSpec

__all__ = ["accepted_args", "build_layer", "check_layer_args", "shapes_of"]


def _signature(layer: AttnLayer) -> inspect.Signature:
    return _known_signature(layer) if isinstance(layer, Hashable) else inspect.signature(layer)


_known_signature = functools.lru_cache(inspect.signature)  # slow, and asked for each layer of a model


def check_layer_args(spec: AttnSpec, channels: int, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a layer does not take the arguments."""
    signature = _signature(get_attn(spec.attn_layer))
    try:
        signature.bind(channels, **kwargs)
    except TypeError as error:
        accepted = ", ".join(list(signature.parameters)[1:]) or "no arguments but channels"
        raise ValueError(
            f"attn_kwargs {kwargs!r} do not fit layer {spec.name!r}: {error}. It takes {accepted}."
        ) from None


def accepted_args(layer: AttnLayer, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments whose names a layer takes."""
    known = _signature(layer).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {name: value for name, value in kwargs.items() if takes_any or name in known}


def build_layer(spec: AttnSpec, channels: int, kwargs: dict[str, Any], device: Any, dtype: Any) -> nn.Module:
    """Return a layer on a device, of a data type, whether it takes these two as arguments or not.

    Raises:
        ValueError: If the layer does not take the arguments, or is no module.
    """
    check_layer_args(spec, channels, kwargs)
    factory = get_attn(spec.attn_layer)
    placed = {name: value for name, value in {"device": device, "dtype": dtype}.items() if value is not None}
    layer = factory(channels, **accepted_args(factory, placed) | kwargs)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"Attention layer {spec.name!r} must make a torch.nn.Module, it made {layer!r}.")
    return layer.to(**placed) if placed else layer


def shapes_of(module: nn.Module, prefix: str = "") -> set[tuple[str, torch.Size]]:
    """Return the keys of a module's tensors and their shapes."""
    return {(f"{prefix}{key}", tensor.shape) for key, tensor in module.state_dict().items()}

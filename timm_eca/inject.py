"""Placing a layer in a model: plan, check, and one function that writes."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .checkpoint import LoadGuard
from .layers.registry import AttnLayer, get_attn
from .placement import Site, find_sites
from .spec import AttnSpec

__all__ = ["ConstructorWithAttn", "add_attn_", "attn_modules", "inject_", "label_", "plan_attn"]

_ModelT = TypeVar("_ModelT", bound=nn.Module)


def plan_attn(
    model: nn.Module,
    attn_layer: str | AttnLayer = "eca",
    *,
    attn_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    attn_stages: Sequence[int] | None = None,
    attn_where: str = "auto",
    attn_init: str = "default",
) -> list[Site]:
    """Return where a layer would go in a model, without touching the model.

    Args:
        model: A timm model that carries no attention of this package yet.
        attn_layer: Registered name, or a class, partial or function whose first argument is `channels`.
        attn_kwargs: Keyword arguments of the layer; a sequence of mappings gives one to each stage.
        attn_stages: Numbers of the stages that get the layer, the first being 1. None: all.
        attn_where: 'auto' (where the paper puts it) or 'end' (end of the residual branch).
        attn_init: 'default' (the layer's own) or 'identity' (the model computes what it computes without it).

    Raises:
        ValueError: If the model has no place for the layer, or an argument does not fit model or layer.
    """
    spec = AttnSpec(attn_layer, attn_kwargs, attn_stages, attn_where, attn_init)
    sites = _checked_sites(model, spec)
    for site in sites:
        _check_layer_args(spec, site)
    return sites


def add_attn_(
    model: _ModelT,
    attn_layer: str | AttnLayer = "eca",
    *,
    attn_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    attn_stages: Sequence[int] | None = None,
    attn_where: str = "auto",
    attn_init: str = "default",
) -> _ModelT:
    """Add a layer to a model already built, in place, and return the model.

    Weights already in the model stay; with attn_init='identity' the norms before the layers are scaled by a power
    of two that the layers undo. All checks come before the first write. Arguments and errors as `plan_attn`.
    """
    spec = AttnSpec(attn_layer, attn_kwargs, attn_stages, attn_where, attn_init)
    inject_(model, spec)
    # timm saves these with the model (`save_for_hf`, `push_to_hf_hub`), so that `create_model` rebuilds it.
    model._model_args = {**getattr(model, "_model_args", {}), **spec.as_args()}  # type: ignore[assignment]
    return model


def inject_(model: _ModelT, spec: AttnSpec, name: str | None = None) -> _ModelT:
    """Write a spec into a model: layers at their sites, `attn_spec` and `attn_sites`, the guard on loading."""
    sites = _checked_sites(model, spec, name)
    layers = [_build_layer(model, spec, site) for site in sites]
    if spec.attn_init == "identity":
        _start_as_identity_(model, spec, sites, layers)
    guard = LoadGuard(
        spec=spec,
        sites=tuple(sites),
        stale_keys=tuple(key for site, layer in zip(sites, layers) for key in _stale_keys(model, site, layer)),
        empty_slots=_empty_slots(model, spec, sites),
    )
    for site, layer in zip(sites, layers):
        _place_(model, site, layer)
    model.register_load_state_dict_pre_hook(guard)
    return label_(model, spec, guard.sites)


def label_(model: _ModelT, spec: AttnSpec, sites: tuple[Site, ...]) -> _ModelT:
    """Set what a model says of itself: `attn_spec` and `attn_sites`."""
    model.attn_spec = spec  # type: ignore[assignment]
    model.attn_sites = sites  # type: ignore[assignment]
    return model


def attn_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that this package placed in a model, by module path."""
    return {site.path: model.get_submodule(site.path) for site in getattr(model, "attn_sites", ())}


class ConstructorWithAttn(Generic[_ModelT]):
    """A stand-in for a model class that constructs the model, then adds attention.

    As `model_cls` of timm's `build_model_with_cfg` it puts the layers in between construction and weight loading.

    Attributes:
        sites: The sites in the model constructed last.
    """

    def __init__(self, model_cls: Callable[..., _ModelT], spec: AttnSpec, name: str):
        self.model_cls = model_cls
        self.name = name
        self.spec = spec
        self.sites: tuple[Site, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> _ModelT:
        model = inject_(self.model_cls(*args, **kwargs), self.spec, self.name)
        self.sites = model.attn_sites  # type: ignore[assignment]
        return model


def _checked_sites(model: nn.Module, spec: AttnSpec, name: str | None = None) -> list[Site]:
    if hasattr(model, "attn_spec"):
        raise ValueError(f"The model already carries attention: {model.attn_spec}. Start from one built without.")
    sites = find_sites(model, spec, name)
    if spec.attn_init == "identity":
        for site in sites:
            _check_scalable(model, site)
    return sites


def _check_scalable(model: nn.Module, site: Site) -> None:
    norm = model.get_submodule(site.norm)
    affine = isinstance(norm, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm))
    if not affine or getattr(norm, "weight", None) is None:
        raise ValueError(
            f"attn_init='identity' scales the weight and bias of the norm before the layer, which it cannot do for"
            f" {site.norm}, {norm}. Accepted: batch, group or layer norm with weight; or attn_init='default'."
        )


def _check_layer_args(spec: AttnSpec, site: Site) -> dict[str, Any]:
    kwargs = spec.kwargs_of(site.stage - 1)
    signature = inspect.signature(get_attn(spec.attn_layer))
    try:
        signature.bind(site.channels, **kwargs)
    except TypeError as error:
        accepted = ", ".join(list(signature.parameters)[1:]) or "no arguments but channels"
        raise ValueError(
            f"attn_kwargs {kwargs!r} do not fit layer {spec.name!r}: {error}. It takes {accepted}."
        ) from None
    return kwargs


def _build_layer(model: nn.Module, spec: AttnSpec, site: Site) -> nn.Module:
    kwargs = _check_layer_args(spec, site)
    like: Any = model.get_submodule(site.conv).weight
    placed: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    factory = get_attn(spec.attn_layer)
    known = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    kwargs = {k: v for k, v in placed.items() if takes_any or k in known} | kwargs
    layer = factory(site.channels, **kwargs)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"Attention layer {spec.name!r} must make a torch.nn.Module, it made {layer!r}.")
    return layer.to(**placed).train(model.training)


def _start_as_identity_(model: nn.Module, spec: AttnSpec, sites: list[Site], layers: Sequence[Any]) -> None:
    if not all(hasattr(layer, "identity_init_") for layer in layers):
        raise ValueError(
            f"attn_init='identity' needs a layer with a method identity_init_(); {spec.name!r} has none, 'eca' has."
        )
    for site, factor in zip(sites, [layer.identity_init_() for layer in layers]):
        norm: Any = model.get_submodule(site.norm)
        with torch.no_grad():
            norm.weight.mul_(factor)
            if norm.bias is not None:
                norm.bias.mul_(factor)


def _stale_keys(model: nn.Module, site: Site, layer: nn.Module) -> list[str]:
    """Return the state-dict keys of the module that gives way to a layer, but those that the layer has too."""
    if site.replaces is None:
        return []
    stale = set(model.get_submodule(site.path).state_dict()) - set(layer.state_dict())
    return sorted(f"{site.path}.{key}" for key in stale)


def _empty_slots(model: nn.Module, spec: AttnSpec, sites: list[Site]) -> tuple[str, ...]:
    """Return the places that attn_stages leaves empty."""
    everywhere = find_sites(model, replace(spec, attn_kwargs=None, attn_stages=None))
    used = {site.path for site in sites}
    return tuple(site.path for site in everywhere if site.replaces is None and site.path not in used)


def _place_(model: nn.Module, site: Site, layer: nn.Module) -> None:
    parent_path, _, name = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, layer)
    # Where timm's own constructor puts it: the order of parameters is that of optimizer states in checkpoints.
    norm = site.norm.rpartition(".")[2]
    if norm in parent._modules:
        children = OrderedDict(parent._modules)
        children.pop(name)
        parent._modules.clear()
        for key, child in children.items():
            parent._modules[key] = child
            if key == norm:
                parent._modules[name] = layer

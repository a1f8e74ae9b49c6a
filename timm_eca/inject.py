"""Placing a layer in a model: plan, check, and one function that writes."""

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from .branches import lookup, tensor_near
from .checkpoint import LoadGuard
from .families import FAMILIES
from .fused import fuse_blocks_
from .gating import Gate, gate_block_, gated_class
from .identity import check_identity, identity_factors, scale_
from .layers import EcaLayer
from .layers.registry import AttnLayer, get_attn
from .making import build_layer, check_layer_args, shapes_of
from .placement import find_sites, placed_by_timm
from .sites import Site, family_of
from .spec import AttnSpec
from .wrappers import moved_site, paths_in

__all__ = [
    "add_attn_",
    "attn_modules",
    "attn_sites",
    "guard_",
    "inject_",
    "label_wrapper_",
    "plan_attn",
    "restart_identity_",
]

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
        attn_where: 'auto', 'end', 'add' or 'stage', as in `AttnSpec`; not 'auto' in timm's ByobNets and NFNets, whose
            constructors place the layer then.
        attn_init: 'default' (the layer's own) or 'identity' (the model computes what it computes without it).

    Raises:
        ValueError: If the model has no place for the layer, or an argument does not fit model or layer.
    """
    spec = AttnSpec(attn_layer, attn_kwargs, attn_stages, attn_where, attn_init)
    sites = _checked_sites(model, spec)
    _check_built(model, spec)
    for site in sites:
        check_layer_args(spec, site.channels, spec.kwargs_of(site.stage - 1))
    return sites


def add_attn_(
    model: _ModelT,
    attn_layer: str | AttnLayer = "eca",
    *,
    attn_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    attn_stages: Sequence[int] | None = None,
    attn_where: str = "auto",
    attn_init: str = "default",
    fused: bool = True,
) -> _ModelT:
    """Add a layer to a model already built, in place, and return the model.

    Weights already in the model stay; with attn_init='identity' the norms before the layers are scaled by a power
    of two that the layers undo. All checks come before the first write. Arguments and errors as `plan_attn`, and:

    Args:
        fused: Fuse the blocks that can be, see `fuse_`.
    """
    spec = AttnSpec(attn_layer, attn_kwargs, attn_stages, attn_where, attn_init)
    _check_built(model, spec)
    inject_(model, spec)
    if fused:
        fuse_blocks_(model)
    # timm saves these with the model (`save_for_hf`, `push_to_hf_hub`), so that `create_model` rebuilds it.
    model._model_args = {**getattr(model, "_model_args", {}), **spec.as_args()}  # type: ignore[assignment]
    return model


def inject_(model: _ModelT, spec: AttnSpec, name: str | None = None) -> _ModelT:
    """Write a spec into a model: layers at their sites, `attn_spec` and `attn_sites`, the guard on loading."""
    sites = _checked_sites(model, spec, name)
    layers = [_layer_for(model, spec, site) for site in sites]
    factors = identity_factors(spec, layers)
    guard = LoadGuard(
        spec=spec,
        sites=tuple(sites),
        replaced=tuple(entry for site in sites for entry in _replaced(model, site)),
        empty_slots=_empty_slots(model, spec, sites),
    )
    for site, layer, factor in zip(sites, layers, factors):
        scale_(model, site.scales, factor)
        _place_(model, site, layer, factor)
    for path, gates in _gates_by_block(sites).items():
        gate_block_(model.get_submodule(path), gates)
    return guard_(model, guard)


def guard_(model: _ModelT, guard: LoadGuard) -> _ModelT:
    """Have a model's guard see what is loaded into it, and set what the model says of itself."""
    model.register_load_state_dict_pre_hook(guard)
    model.attn_guard = guard  # type: ignore[assignment]
    return _label_(model, guard.spec, guard.sites)


def _label_(model: _ModelT, spec: AttnSpec, sites: tuple[Site, ...]) -> _ModelT:
    model.attn_spec = spec  # type: ignore[assignment]
    model.attn_sites = sites  # type: ignore[assignment]
    return model


def attn_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that this package placed in a model, by module path."""
    return {site.path: model.get_submodule(site.path) for site in attn_sites(model)}


def label_wrapper_(wrapper: nn.Module, model: nn.Module) -> nn.Module:
    """Set the label of a wrapper for feature extraction, with the paths that the model's layers have in it.

    Where the wrapper holds parts of the model only, the model's guard on loading is not among them: it gets its own.
    """
    paths = paths_in(wrapper, model)
    layers = {moved_site(site, paths): lookup(model, site.path) for site in attn_sites(model)}
    kept = tuple(site for site, layer in layers.items() if layer is not None and lookup(wrapper, site.path) is layer)
    if not any(module is model for module in wrapper.modules()):
        inner: Any = model.attn_guard
        apart = {s.path: m for s, m in layers.items() if isinstance(m, nn.Module) and s not in kept}
        guard_(wrapper, inner.moved(paths, apart))
    return _label_(wrapper, model.attn_spec, kept)  # type: ignore[arg-type]


def attn_sites(model: nn.Module) -> tuple[Site, ...]:
    """Return where this package placed layers in a model."""
    return getattr(model, "attn_sites", ())


def restart_identity_(model: nn.Module) -> None:
    """Start anew as identity, after plain weights were written into a model that had started so."""
    for site in attn_sites(model):
        layer: Any = model.get_submodule(site.path)
        scale_(model, site.scales, layer.identity_init_())


def _check_built(model: nn.Module, spec: AttnSpec) -> None:
    """Raise ValueError where 'auto' means what only a constructor can do, and a saved model would be rebuilt so."""
    if spec.attn_where == "auto" and family_of(model) in FAMILIES and placed_by_timm(type(model)):
        raise ValueError(
            f"attn_where='auto' leaves the place to the constructor of {type(model).__name__}, and this model is built:"
            " give attn_layer to timm.create_model, or say attn_where='end' or 'add' here."
        )


def _checked_sites(model: nn.Module, spec: AttnSpec, name: str | None = None) -> list[Site]:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, got {model!r}. For a name: timm.create_model(..., attn_layer=)."
        )
    if hasattr(model, "attn_spec"):
        raise ValueError(f"The model already carries attention: {model.attn_spec}. Start from one built without.")
    sites = find_sites(model, spec, name)
    if spec.attn_init == "identity":
        check_identity(sites)
    for path, gates in _gates_by_block(sites).items():
        gated_class(type(model.get_submodule(path)), gates)
    return sites


def _layer_for(model: nn.Module, spec: AttnSpec, site: Site) -> nn.Module:
    like = tensor_near(model, site.like)
    kwargs = spec.kwargs_of(site.stage - 1)
    if site.replaces and not kwargs and get_attn(spec.attn_layer) is EcaLayer:
        kwargs = _size_of_replaced(model.get_submodule(site.path))
    return build_layer(spec, site.channels, kwargs, like.device, like.dtype).train(model.training)


def _size_of_replaced(module: nn.Module) -> dict[str, Any]:
    """ECA in place of ECA has its size: pruning may have narrowed the model since, and weights are for that size."""
    return {"kernel_size": module.conv.kernel_size[0]} if isinstance(module, EcaLayer) else {}


def _replaced(model: nn.Module, site: Site) -> list[tuple[str, torch.Size]]:
    """Return the tensors of the modules that give way to a layer."""
    gone = [*site.removes, *([site.path] if site.replaces else [])]
    return sorted(entry for path in gone for entry in shapes_of(model.get_submodule(path), f"{path}."))


def _empty_slots(model: nn.Module, spec: AttnSpec, sites: list[Site]) -> tuple[str, ...]:
    """Return the places that attn_stages leaves empty."""
    if spec.attn_stages is None:
        return ()
    everywhere = find_sites(model, replace(spec, attn_kwargs=None, attn_stages=None))
    used = {site.path for site in sites}
    return tuple(site.path for site in everywhere if site.replaces is None and site.path not in used)


def _place_(model: nn.Module, site: Site, layer: nn.Module, gain: float) -> None:
    for path in site.removes:
        _remove_(model, path)
    parent_path, _, name = site.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, layer)
    like_path, _, anchor = site.like.rpartition(".")
    if like_path == parent_path:
        _move_after_(parent, name, anchor)
    if site.gain is not None:
        like = tensor_near(model, site.like)
        gain_of = torch.full((), gain, device=like.device, dtype=like.dtype)
        parent.register_buffer(site.gain.rpartition(".")[2], gain_of)


def _gates_by_block(sites: Sequence[Site]) -> dict[str, tuple[Gate, ...]]:
    gates: dict[str, tuple[Gate, ...]] = {}
    for site in sites:
        if site.block is not None and site.gate is not None:
            gates[site.block] = (*gates.get(site.block, ()), site.gate)
    return gates


def _remove_(model: nn.Module, path: str) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    skipped_if_none = f"self.{name} is not None" in inspect.getsource(type(parent).forward)
    setattr(parent, name, None if skipped_if_none else nn.Identity())


def _move_after_(parent: nn.Module, name: str, anchor: str) -> None:
    """Register a child where timm's constructor does: the order of parameters is that of saved optimizer states."""
    children = OrderedDict(parent._modules)
    layer = children.pop(name)
    parent._modules.clear()
    for key, child in children.items():
        parent._modules[key] = child
        if key == anchor:
            parent._modules[name] = layer

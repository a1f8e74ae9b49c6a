"""Which models plain timm can express, and how: adaptive ECA in every block of a ResNet, through `block_args`."""

from typing import Any

import timm
from timm.layers import Sigmoid
from timm.models.resnet import ResNet
from torch import nn

from .inject import attn_modules
from .layers import EcaLayer, adaptive_kernel_size
from .making import shapes_of
from .spec import ATTN_ARGS

__all__ = ["kernel_sizes", "portable_form"]

OWN_ARGS = (*ATTN_ARGS, "kernel_sizes", "fused")


def kernel_sizes(model: nn.Module) -> list[int] | None:
    """Return the ECA kernel size of each stage, or None where stages carry other layers or several sizes."""
    sizes: dict[int, set[int]] = {}
    for site in getattr(model, "attn_sites", ()):
        layer = model.get_submodule(site.path)
        if not isinstance(layer, EcaLayer):
            return None
        sizes.setdefault(site.stage, set()).add(layer.conv.kernel_size[0])
    return [min(s) for s in sizes.values()] if all(len(s) == 1 for s in sizes.values()) else None


def portable_form(model: nn.Module, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return a model's config as plain timm can use it, or None if plain timm cannot express the model.

    timm's own ECA layer has the same weights and computes the same, but takes no arguments inside a ResNet: its
    kernel size is the adaptive one of Eq. 12, its gate the sigmoid.

    Args:
        model: The model, with attention of this package or without.
        config: Its config as timm writes it.
    """
    spec = getattr(model, "attn_spec", None)
    if spec is None:
        return config
    sites: Any = model.attn_sites if type(model) is ResNet and spec.attn_stages is None else ()
    if not sites or not all(_as_timms(model, site.path, site.channels) for site in sites):
        return None
    args = {name: value for name, value in config.get("model_args", {}).items() if name not in OWN_ARGS}
    args["block_args"] = {**args.get("block_args", {}), "attn_layer": "eca"}
    architecture = str(getattr(model, "attn_backbone", config["architecture"]))
    config = {**config, "architecture": architecture, "model_args": args}
    return config if _builds(model, config) else None


def _as_timms(model: nn.Module, path: str, channels: int) -> bool:
    layer = attn_modules(model)[path]
    return (
        type(layer) is EcaLayer
        and isinstance(layer.gate, (nn.Sigmoid, Sigmoid))
        and layer.conv.kernel_size == (adaptive_kernel_size(channels),)
    )


def _builds(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether a config makes a model with the same tensors."""
    args = {**config["model_args"], "num_classes": config["num_classes"], "device": "meta"}
    return shapes_of(timm.create_model(config["architecture"], **args)) == shapes_of(model)

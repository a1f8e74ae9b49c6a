"""An entrypoint is a row of a table plus one call: timm's own entrypoint, with attention and its own weights."""

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import model_entrypoint
from torch import nn

from ._sources import checked_source, default_source, hub_id, name_source
from .released import TAG

__all__ = ["KernelSizes", "create_eca", "eca_cfg"]

FEATURE_STAGES = (1, 2, 3, 4)
"""A ResNet's stages: the numbers of its blocks' stages, and under attn_where='stage' those of timm's features."""

KernelSizes = str | int | Sequence[int]
"""'adaptive' (Eq. 12), one kernel size for all blocks, or one for each stage."""


def eca_cfg(name: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Return the default cfg of a model under its tagged name, as `generate_default_cfgs` takes it."""
    tagged = f"{name}.{TAG}"
    return {
        tagged: {
            "hf_hub_id": hub_id(tagged),
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "license": "mit",
            "origin_url": "https://github.com/BangguWu/ECANet",
            "paper_name": "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
            "paper_ids": "arXiv:1910.03151",
            **kwargs,
        }
    }


def create_eca(
    name: str,
    backbone: str,
    preset: KernelSizes,
    stages: Sequence[int],
    pretrained: bool = False,
    kernel_sizes: KernelSizes | None = None,
    attn_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create an ECA model from timm's entrypoint of its backbone.

    Args:
        name: Name under which the model is registered.
        backbone: Name of timm's model that carries the layer.
        preset: Kernel sizes used where none are asked for.
        stages: Numbers of the stages that carry the layer.
        pretrained: Load the weights of the model's default cfg.
        kernel_sizes: Kernel sizes asked for.
        attn_kwargs: Further keyword arguments of `EcaLayer`.
        **kwargs: Passed to timm's entrypoint.

    Raises:
        ValueError: If kernel_sizes fit neither the layer nor the stages, or another layer is asked for.
        WeightsError: If pretrained weights cannot be had, or are not what they should be.
    """
    if "attn_layer" in kwargs:
        raise ValueError(f"{name} carries 'eca'; for attn_layer={kwargs['attn_layer']!r} create {backbone!r} with it.")
    if attn_kwargs and (not isinstance(attn_kwargs, dict) or "kernel_size" in attn_kwargs):
        raise ValueError(
            f"attn_kwargs of {name} must be a dict without kernel_size, got {attn_kwargs!r}; use kernel_sizes."
        )
    sizes = _per_stage(preset if kernel_sizes is None else kernel_sizes, stages)
    if kwargs.get("attn_where") == "stage" and tuple(stages) != FEATURE_STAGES:
        sizes, stages = _for_all_stages(name, sizes, stages), (1,)
    of_stages: list[dict[str, Any]] = [{}] * (stages[0] - 1)
    of_stages += [{**(attn_kwargs or {}), "kernel_size": size} for size in sizes]
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cfg = default_source(name, kwargs.pop("pretrained_cfg", None), overlay)
    model = model_entrypoint(backbone)(
        pretrained=pretrained,
        pretrained_cfg=checked_source(cfg, kwargs.get("cache_dir"), backbone, overlay) if pretrained else cfg,
        attn_layer="eca",
        attn_kwargs=of_stages if len(of_stages) > 1 else of_stages[0],
        **kwargs,
    )
    model.attn_backbone = backbone
    name_source(model, cfg)
    return model


def _per_stage(kernel_sizes: KernelSizes, stages: Sequence[int]) -> list[int | None]:
    if kernel_sizes == "adaptive":
        return [None] * len(stages)
    if isinstance(kernel_sizes, int):
        return [kernel_sizes] * len(stages)
    if isinstance(kernel_sizes, (list, tuple)) and len(kernel_sizes) == len(stages):
        return list(kernel_sizes)
    raise ValueError(
        f"kernel_sizes must be 'adaptive', an odd number, or {len(stages)} odd numbers, one per stage"
        f" ({stages[0]} to {stages[-1]}), got {kernel_sizes!r}."
    )


def _for_all_stages(name: str, sizes: list[int | None], stages: Sequence[int]) -> list[int | None]:
    """Return the one size that all stages have, where the stages counted are others than the sizes are for."""
    if len(set(sizes)) > 1:
        raise ValueError(
            f"kernel_sizes of {name} are for the stages {stages[0]} to {stages[-1]} of its blocks, and"
            f" attn_where='stage' counts others: give 'adaptive' or one odd number, got {tuple(sizes)}."
        )
    return sizes[:1]

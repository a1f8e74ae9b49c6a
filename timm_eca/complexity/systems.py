"""The systems of the paper's tables as models, with the readings of a row that were tried, best first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import timm
from torch import nn

from ..inject import add_attn_
from ..layers.registry import get_attn
from ..models.eca_mobilenetv2 import KERNEL_SIZES as MOBILENETV2_KERNEL_SIZES
from ..models.eca_resnet import KERNEL_SIZES as RESNET_KERNEL_SIZES

__all__ = ["Reading", "eca", "plain", "readings"]


class Reading(NamedTuple):
    """One way to read a row of a table.

    Attributes:
        label: What is built and counted.
        build: Makes the model from the name of timm's backbone, on the meta device.
        params_unit: Unit of the row's parameters where it differs from the table's.
        flops_unit: Unit of the row's multiply-adds where it differs from the table's.
    """

    label: str
    build: Callable[[str], nn.Module]
    params_unit: str | None = None
    flops_unit: str | None = None


def readings(method: str, backbone: str, table: str) -> tuple[Reading, ...]:
    """Return the readings of a table's row, the best first."""
    found = _READINGS[method]
    if method == "SENet" and backbone.startswith("mobilenet"):
        return tuple(_se_mobilenet(r) for r in (8, 16))
    if method == "CBAM" and table == "table_a":
        return found[::-1]  # copied from CBAM's paper, whose layers have biases
    return found


def plain(backbone: str, **kwargs: Any) -> nn.Module:
    """Return timm's backbone without attention."""
    return timm.create_model(backbone, device="meta", **kwargs)


def eca(backbone: str) -> nn.Module:
    """Return the backbone with ECA in the kernel sizes that the authors released."""
    sizes = MOBILENETV2_KERNEL_SIZES if backbone.startswith("mobilenet") else RESNET_KERNEL_SIZES[f"eca_{backbone}"]
    return add_attn_(plain(backbone), "eca", attn_kwargs=[{"kernel_size": k} for k in sizes])


def _with(layer: str, stages: tuple[int, ...] | None = None, **kwargs: Any) -> Callable[[str], nn.Module]:
    """Build with a layer in each block of some stages, where `attn_layer=` puts it."""
    return lambda backbone: add_attn_(plain(backbone), layer, attn_stages=stages, attn_kwargs=kwargs)


def _after(layer: str, blocks: Mapping[int, tuple[int, ...]], output_stride: int = 32, **kwargs: Any):
    """Build with a layer after chosen residual units of a ResNet, whose numbers in a stage count from 0."""

    def build(backbone: str) -> nn.Module:
        model = plain(backbone, output_stride=output_stride)
        for stage, indices in blocks.items():
            units: Any = model.get_submodule(f"layer{stage}")
            for index in indices:
                unit = units[index % len(units)]
                units[index % len(units)] = nn.Sequential(
                    unit, get_attn(layer)(unit.conv3.out_channels, device="meta", **kwargs)
                )
        return model

    return build


def _augmented(stages: tuple[int, ...], relative: bool, min_key_dim: int) -> Callable[[str], nn.Module]:
    """Build with attention-augmented convolutions in place of the 3x3 convolutions of a ResNet's stages."""

    def build(backbone: str) -> nn.Module:
        model = plain(backbone)
        for stage in stages:
            size = 112 // 2**stage
            for unit in model.get_submodule(f"layer{stage}").children():
                conv: Any = unit.conv2
                unit.conv2 = get_attn("aa")(
                    conv.in_channels,
                    conv.out_channels,
                    stride=conv.stride[0],
                    min_key_dim=min_key_dim,
                    feat_size=(size, size) if relative else None,
                    device="meta",
                )
        return model

    return build


def _se_mobilenet(reduction: int) -> Reading:
    return Reading(
        f"SE without biases, r = {reduction}, after each block's projection", _with("se_paper", reduction=reduction)
    )


# Non-local networks put five blocks into stages 2 and 3, after every other unit; A2-Nets follow them.
_NL_BLOCKS = {2: (0, 2), 3: (0, 2, 4)}
_LAST_OF_2_TO_4 = {2: (-1,), 3: (-1,), 4: (-1,)}
_GC: dict[str, Any] = {"fuse_add": True, "fuse_scale": False, "rd_ratio": 1 / 16}
_DECIMAL = {"params_unit": "10^6", "flops_unit": "10^9"}

_READINGS: dict[str, tuple[Reading, ...]] = {
    "ResNet": (Reading("timm's model", plain),),
    "MobileNetV2": (Reading("timm's model", plain),),
    "ECA-Net": (Reading("released kernel sizes", eca),),
    "SENet": (
        Reading("SE without biases, r = 16", _with("se_paper")),
        Reading("SE with biases, r = 16 (timm's)", _with("se", rd_ratio=1 / 16)),
        Reading("SE without biases, r = 16, stages 2 to 4", _with("se_paper", (2, 3, 4))),
    ),
    "CBAM": (
        Reading("timm's CBAM, no biases", _with("cbam")),
        Reading("timm's CBAM with biases", _with("cbam", mlp_bias=True)),
    ),
    "A2-Nets": (
        Reading("5 blocks in stages 2 and 3, m = n = C / 2", _after("a2", _NL_BLOCKS, reduction=2), **_DECIMAL),
        Reading("5 blocks in stages 2 and 3, m = n = C / 4", _after("a2", _NL_BLOCKS, reduction=4), **_DECIMAL),
        Reading("5 blocks in stage 3, m = n = C / 4", _after("a2", {3: (0, 1, 2, 3, 4)}, reduction=4), **_DECIMAL),
    ),
    "GCNet": (
        Reading("timm's GC, addition, r = 16, stages 2 to 4", _with("gc", (2, 3, 4), **_GC), "10^6"),
        Reading("timm's GC, addition, r = 16, all stages", _with("gc", **_GC), "10^6"),
    ),
    "NL": (Reading("one NL block after stage 3's last unit but one", _after("nl_paper", {3: (-2,)})),),
    "GSoP-Net1": (
        Reading("after stages 2 to 4, stage 4 at stride 1", _after("gsop", _LAST_OF_2_TO_4, 16), **_DECIMAL),
        Reading("after stages 2 to 4", _after("gsop", _LAST_OF_2_TO_4), **_DECIMAL),
        Reading("after all stages, stage 4 at stride 1", _after("gsop", {1: (-1,), **_LAST_OF_2_TO_4}, 16), **_DECIMAL),
    ),
    "AA-Net": (
        Reading("stages 2 to 4, relative positions", _augmented((2, 3, 4), True, 20), **_DECIMAL),
        Reading("stages 2 to 4, no positions", _augmented((2, 3, 4), False, 20), **_DECIMAL),
        Reading("stages 2 to 4, keys of any width", _augmented((2, 3, 4), True, 1), **_DECIMAL),
        Reading("stages 3 and 4, relative positions", _augmented((3, 4), True, 20), **_DECIMAL),
    ),
}

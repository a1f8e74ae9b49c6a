"""Key layouts: the official repository's names of weights, and timm's. The renames are written here and only here."""

import re
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["in_timm_layout"]

_T = TypeVar("_T")

REPEATS = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals per stage of MobileNetV2
FIRST_BLOCK = {
    "conv.0.0": "conv_dw",
    "conv.0.1": "bn1",
    "conv.1": "conv_pw",
    "conv.2": "bn2",
    "conv.3.conv": "attn_last.conv",
}
BLOCK = {
    "conv.0.0": "conv_pw",
    "conv.0.1": "bn1",
    "conv.1.0": "conv_dw",
    "conv.1.1": "bn2",
    "conv.2": "conv_pwl",
    "conv.3": "bn3",
    "conv.4.conv": "attn_last.conv",
}
OUTSIDE = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.18.0": "conv_head",
    "features.18.1": "bn2",
    "classifier.1": "classifier",
}


def _mobilenetv2_modules() -> dict[str, str]:
    """Return timm's module path for each official one: the stem, 17 inverted residuals, the head."""
    modules = dict(OUTSIDE)
    number = 1
    for stage, repeats in enumerate(REPEATS):
        for block in range(repeats):
            names = FIRST_BLOCK if number == 1 else BLOCK
            modules |= {f"features.{number}.{a}": f"blocks.{stage}.{block}.{b}" for a, b in names.items()}
            number += 1
    return modules


MOBILENETV2 = _mobilenetv2_modules()
RESNET_ATTN = re.compile(r"^(layer\d+\.\d+)\.eca\.")


def in_timm_layout(tensors: Mapping[str, _T], name: str = "The checkpoint") -> tuple[bool, dict[str, _T]]:
    """Return whether keys are the official repository's, and the tensors under timm's keys.

    A key that neither layout knows stays as it is.

    Args:
        tensors: The tensors, or what stands for them, by key.
        name: What to call them in messages.

    Raises:
        ValueError: If two keys are one weight's, in either layout.
    """
    official = any(RESNET_ATTN.match(key) or key.startswith("features.") for key in tensors)
    if not official:
        return False, dict(tensors)
    keys: dict[str, str] = {}  # by timm's
    for key in tensors:
        other = keys.setdefault(_renamed(key), key)
        if other != key:
            raise ValueError(f"{name} holds one weight twice, as {other} and as {key}: which of them counts?")
    return True, {renamed: tensors[key] for renamed, key in keys.items()}


def _renamed(key: str) -> str:
    module, _, name = key.rpartition(".")
    if module in MOBILENETV2:
        return f"{MOBILENETV2[module]}.{name}"
    return RESNET_ATTN.sub(r"\1.se.", key)

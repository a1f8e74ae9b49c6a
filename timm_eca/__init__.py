"""Efficient Channel Attention (ECA-Net, CVPR 2020) for timm.

Importing the package registers its attention layers and models with timm:
`timm.create_model('resnet50', attn_layer='eca')`, `timm.create_model('eca_resnet50')`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from . import checkout  # noqa: F401  first: it sees to it that the installed timm is imported
from .fused import fuse_, unfuse_
from .inject import add_attn_, attn_modules, attn_sites, plan_attn
from .layers import EcaLayer, adaptive_kernel_size, get_attn, list_attns, register_attn
from .sites import Site
from .spec import AttnSpec
from .timm_hooks import install, installed, uninstall

__all__ = [
    "AttnSpec",
    "EcaLayer",
    "Site",
    "adaptive_kernel_size",
    "add_attn_",
    "attn_modules",
    "attn_sites",
    "fuse_",
    "get_attn",
    "install",
    "installed",
    "list_attns",
    "plan_attn",
    "register_attn",
    "unfuse_",
    "uninstall",
]

__version__ = version("timm-eca")

install()


def __getattr__(name: str) -> Any:
    """Import `timm_eca.convert` and `timm_eca.hub` when they are first named."""
    if name in ("convert", "hub"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

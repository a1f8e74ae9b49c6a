"""Attention layers and their registry. Knows no models."""

from . import (
    a2,
    aa,
    da,
    eca_ns,
    eca_spatial,
    gather_excite,
    ge_theta_plus,
    gsop,
    paper_names,
    scse,
    se_paper,
    timm_layers,
)
from .eca import EcaLayer, adaptive_kernel_size
from .registry import AttnLayer, get_attn, list_attns, register_attn

__all__ = [
    "AttnLayer",
    "EcaLayer",
    "a2",
    "aa",
    "adaptive_kernel_size",
    "da",
    "eca_ns",
    "eca_spatial",
    "gather_excite",
    "ge_theta_plus",
    "get_attn",
    "gsop",
    "list_attns",
    "paper_names",
    "register_attn",
    "scse",
    "se_paper",
    "timm_layers",
]

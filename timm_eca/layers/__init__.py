"""Attention layers and their registry. Knows no models."""

from . import timm_layers
from .eca import EcaLayer, adaptive_kernel_size
from .registry import AttnLayer, get_attn, list_attns, register_attn

__all__ = ["AttnLayer", "EcaLayer", "adaptive_kernel_size", "get_attn", "list_attns", "register_attn", "timm_layers"]

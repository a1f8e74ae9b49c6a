"""Attention for free: residual blocks whose norm, ECA, addition and ReLU are one function."""

from .blocks import fuse_, fuse_blocks_, unfuse_

__all__ = ["fuse_", "fuse_blocks_", "unfuse_"]

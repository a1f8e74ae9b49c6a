"""`timm-eca demo`: a plain and an ECA network on real data, end to end, with no network access."""

from .run import run_demo

__all__ = ["run_demo"]

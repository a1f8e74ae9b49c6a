"""Entrypoints. `timm_hooks` registers them with timm, so that `uninstall` can take them back."""

from . import eca_inception, eca_mobilenetv2, eca_resnet, eca_resnext

__all__ = ["ENTRYPOINTS"]

ENTRYPOINTS = tuple(
    getattr(module, name)
    for module in (eca_resnet, eca_resnext, eca_mobilenetv2, eca_inception)
    for name in module.__all__
)

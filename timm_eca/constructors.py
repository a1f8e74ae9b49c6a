"""Stand-ins for timm's model classes that construct a model with attention."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

from .checkpoint import LoadGuard
from .inject import guard_, inject_
from .layers.registry import get_attn
from .making import accepted_args, build_layer, shapes_of
from .placement import placed_site
from .spec import AttnSpec

__all__ = ["ConstructorByTimm", "ConstructorWithAttn"]

_ModelT = TypeVar("_ModelT", bound=nn.Module)


class ConstructorWithAttn(Generic[_ModelT]):
    """A stand-in for a model class that constructs the model, then adds attention.

    As `model_cls` of timm's `build_model_with_cfg` it puts the layers in between construction and weight loading.

    Attributes:
        model: The model constructed last, also where timm wraps it for feature extraction later.
    """

    def __init__(self, model_cls: Callable[..., _ModelT], spec: AttnSpec, name: str):
        self.model_cls = model_cls
        self.name = name
        self.spec = spec
        self.model: _ModelT | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> _ModelT:
        self.model = inject_(self.model_cls(*args, **kwargs), self.spec, self.name)
        return self.model


class ConstructorByTimm(ConstructorWithAttn[_ModelT]):
    """A stand-in for a model class whose own configuration has `attn_layer`: timm's constructor places the layers.

    Arguments that the configuration has for its own layer stay, as timm has it, unless others are given; those that
    the new layer does not take go.
    """

    def __call__(self, *args: Any, attn_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> _ModelT:
        asked = {} if attn_kwargs is None else {"attn_kwargs": attn_kwargs}
        made: dict[nn.Module, int] = {}

        def make(channels: int, device: Any = None, dtype: Any = None, **layer_kwargs: Any) -> nn.Module:
            fitting = accepted_args(get_attn(self.spec.attn_layer), layer_kwargs)
            given = {name: layer_kwargs[name] for name in self.spec.kwargs_of(0) if name in layer_kwargs}
            layer = build_layer(self.spec, channels, fitting | given, device, dtype)
            made[layer] = channels
            return layer

        model = self.model_cls(*args, **kwargs, attn_layer=make, **asked)
        sites = tuple(placed_site(model, path, made[m]) for path, m in model.named_modules() if m in made)
        if not sites:  # some configurations have the argument and no block that heeds it
            return super().__call__(*args, **kwargs)
        plain = self.model_cls(*args, **{**kwargs, "device": "meta"})
        layers = tuple(f"{site.path}." for site in sites)
        kept = {(key, shape) for key, shape in shapes_of(model) if not key.startswith(layers)}
        replaced = tuple(sorted(shapes_of(plain) - kept))
        self.model = guard_(model, LoadGuard(self.spec, sites, replaced))
        return self.model

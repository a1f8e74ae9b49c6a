"""The doors into timm: attention by name, `attn_layer=` on any backbone, and this package's entrypoints.

The only file that touches timm's internals. timm's modules hold `get_attn` and `build_model_with_cfg` by name, each
its own reference, so a door is opened by rebinding the name in every module of timm that holds it, to a hook of what
it held: a caller's wrapper there is still called. `uninstall` puts every reference back and takes the entrypoints out
of timm's registry.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import timm.layers
import timm.models
from timm.models import _registry
from timm.models._hub import save_config_for_hf
from timm.models._prune import adapt_model_from_file
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .constructors import ConstructorByTimm, ConstructorWithAttn
from .fused import fuse_blocks_
from .inject import label_wrapper_, restart_identity_
from .layers import registry as attn_registry
from .models import ENTRYPOINTS
from .placement import EXAMPLES, placed_by_timm
from .spec import ATTN_ARGS, AttnSpec

__all__ = ["install", "installed", "save_config_for_hf", "uninstall"]


def _is_hook(function: Callable[..., Any]) -> bool:
    """Whether a function is a hook, of this import or an earlier one; a wrapper of one has its attributes too."""
    hooked = getattr(function, "timm_eca_hooks", None)
    return hooked is not None and getattr(function, "__wrapped__", None) is hooked


def _unhooked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a reference held before it was hooked, by this import or an earlier one."""
    while _is_hook(function):
        function = vars(function)["timm_eca_hooks"]
    return function


def _hook(body: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes of a function its hook: the body, given that function first. One function has one hook."""

    @functools.cache
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def hook(*args: Any, **kwargs: Any) -> Any:
            return body(original, *args, **kwargs)

        vars(hook)["timm_eca_hooks"] = original
        return hook

    return make


@_hook
def _get_attn(original: Callable[..., Any], attn_type: Any) -> Any:
    if not isinstance(attn_type, str) or not attn_type:
        return original(attn_type)
    if attn_type.lower() in attn_registry.list_attns():
        return attn_registry.get_attn(attn_type)
    try:
        return original(attn_type)
    except AssertionError:
        raise attn_registry.unknown_attn(attn_type) from None


@_hook
def _build_model_with_cfg(
    original: Callable[..., Any],
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    asked = {name: kwargs[name] for name in (*ATTN_ARGS, "fused") if kwargs.get(name) is not None}
    kept = ("attn_layer", *asked)  # attn_layer=None says something to a constructor that knows it
    kwargs = {name: value for name, value in kwargs.items() if name in kept or name not in (*ATTN_ARGS, "fused")}
    if _names_self_attention(variant, model_cls, asked, kwargs.get("cfg")) or _left_to_constructor(model_cls, asked):
        return original(model_cls, variant, pretrained, *args, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in (*ATTN_ARGS, "fused")}
    if not asked:
        return original(model_cls, variant, pretrained, *args, **kwargs)
    fused = asked.pop("fused", True)
    spec = _spec(asked)
    by_timm = _placed_by_timm(variant, model_cls, spec, asked)
    if by_timm and "attn_kwargs" in asked:
        kwargs["attn_kwargs"] = asked["attn_kwargs"]
    if kwargs.pop("pruned", False):
        model_cls = _pruned_first(model_cls, variant)
    construct = (ConstructorByTimm if by_timm else ConstructorWithAttn)(model_cls, spec, variant)
    watched = _Watched(construct)
    model = original(watched, variant, pretrained, *args, **kwargs)
    watched.hook.remove()
    inner: Any = construct.model
    # Whether the model reads foreign weights by itself, past the guard on loading, its cfg alone does not tell:
    # timm heeds custom_load for some sources only.
    if pretrained and spec.attn_init == "identity" and not watched.loads:
        restart_identity_(inner)
    if fused:
        fuse_blocks_(model)
    return model if hasattr(model, "attn_spec") else label_wrapper_(model, inner)


class _Watched:
    """A constructor whose model, until the hook is removed, counts the calls of its `load_state_dict`."""

    def __init__(self, construct: Callable[..., nn.Module]):
        self.construct = construct
        self.loads = 0
        self.hook: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = self.construct(*args, **kwargs)
        self.hook = model.register_load_state_dict_pre_hook(self._count)
        return model

    def _count(self, *_: Any) -> None:
        self.loads += 1


def _names_self_attention(variant: str, model_cls: Any, asked: dict[str, Any], cfg: Any) -> bool:
    """Whether `attn_layer` names a model's self-attention, which this package leaves alone."""
    if not _is_transformer(model_cls):
        return False
    if _is_registered(getattr(cfg, "attn_layer", None)):
        raise ValueError(
            f"{variant} has no place for channel attention: it has no convolutional block, and its attn_layer names"
            f" the self-attention, got {cfg.attn_layer!r}. Models that take it: {', '.join(EXAMPLES)}."
        )
    return not asked or (set(asked) == {"attn_layer"} and not _is_registered(asked["attn_layer"]))


def _is_transformer(model_cls: Any) -> bool:
    return isinstance(model_cls, type) and issubclass(model_cls, (VisionTransformer, NaFlexVit))


def _left_to_constructor(model_cls: Any, asked: dict[str, Any]) -> bool:
    """Whether a model's own constructor is to do with its attention arguments what it did before this package came.

    timm's own have them for the layer of their configuration too; what those of others mean by theirs is up to them.
    """
    if not asked.keys() <= {"attn_layer", "attn_kwargs"}:
        return False
    if placed_by_timm(model_cls):
        return not asked.get("attn_layer")
    if _is_transformer(model_cls) or model_cls.__module__.startswith("timm."):
        return False
    return "attn_layer" in inspect.signature(model_cls).parameters


def _is_registered(layer: Any) -> bool:
    return isinstance(layer, str) and layer.lower() in attn_registry.list_attns()


def _placed_by_timm(variant: str, model_cls: Any, spec: AttnSpec, asked: dict[str, Any]) -> bool:
    """Whether timm's constructor is to place the layer itself."""
    if spec.attn_where != "auto" or not placed_by_timm(model_cls):
        return False
    more = sorted({"attn_stages", "attn_init"} & set(asked)) + ["attn_kwargs per stage"] * (
        not isinstance(spec.attn_kwargs, dict)
    )
    if more:
        raise ValueError(
            f"timm places attn_layer in {variant} itself and takes attn_layer and attn_kwargs, got"
            f" {', '.join(more)} too. For these say attn_where='end' or 'add'."
        )
    return True


def _spec(asked: dict[str, Any]) -> AttnSpec:
    if "attn_layer" not in asked:
        raise ValueError(
            f"{', '.join(asked) or 'fused'} given without attn_layer. Name the layer, for example attn_layer='eca'."
        )
    return AttnSpec(**asked)


def _pruned_first(model_cls: Callable[..., nn.Module], variant: str) -> Callable[..., nn.Module]:
    """Construct, then narrow the convolutions as timm does later: layers are to be as wide as what is left."""
    return lambda *args, **kwargs: adapt_model_from_file(model_cls(*args, **kwargs), variant)


_HOOKS = {
    "get_attn": ("timm.layers.create_attn", _get_attn),
    "build_model_with_cfg": ("timm.models._builder", _build_model_with_cfg),
}
"""Names of timm's functions: the module that defines each, and what makes its hook."""


def _references(name: str) -> Iterator[tuple[ModuleType, Callable[..., Any]]]:
    """Every module of timm that holds a function, with what it holds: that, its hook, or a caller's wrapper of it."""
    defined = inspect.unwrap(getattr(sys.modules[_HOOKS[name][0]], name))
    for module in [m for path, m in list(sys.modules.items()) if m is not None and path.partition(".")[0] == "timm"]:
        held = vars(module).get(name)
        if callable(held) and inspect.unwrap(held) is defined:
            yield module, held


def install() -> None:
    """Open the doors; importing the package does. Calling it again changes nothing."""
    for name, (_, hook) in _HOOKS.items():
        for module, held in _references(name):
            setattr(module, name, hook(_unhooked(held)))
    for entrypoint in ENTRYPOINTS:
        _register(entrypoint)


def uninstall() -> None:
    """Close the doors: timm is as it was before the package was imported. Calling it again changes nothing.

    Models built before keep working. The package's own functions (`add_attn_`, `get_attn`, ...) work without doors.
    """
    for name in _HOOKS:
        for module, held in _references(name):
            setattr(module, name, _unhooked(held))
    for entrypoint in ENTRYPOINTS:
        _unregister(entrypoint.__name__)


def installed() -> bool:
    """Whether the doors are open."""
    held = sys.modules["timm.layers.create_attn"].get_attn
    return held is _get_attn(_unhooked(held))


def _register(entrypoint: Callable[..., nn.Module]) -> None:
    registered = _registry._model_entrypoints.get(entrypoint.__name__)
    if registered is entrypoint:
        return
    with warnings.catch_warnings():
        if registered is not None and registered.__module__ == entrypoint.__module__:
            warnings.simplefilter("ignore")  # the same entrypoint of an earlier import of this package
        timm.models.register_model(entrypoint)


def _unregister(name: str) -> None:
    if name in _registry._model_entrypoints:
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name]

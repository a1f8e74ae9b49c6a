"""What a model with attention accepts as its checkpoint.

One hook on the model sees every way in: timm's `pretrained=True` and `checkpoint_path=`, and the user's own
`load_state_dict`. timm turns strict loading off in some of them, so missing attention weights must be found here.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .branches import lookup, tensor_key
from .errors import some
from .sites import Site
from .spec import AttnSpec
from .wrappers import moved, moved_site

__all__ = ["LoadGuard"]

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoadGuard:
    """Hook for `register_load_state_dict_pre_hook` of a model with attention.

    A checkpoint without any attention weight is a plain backbone's: the layers keep their initial values, and an
    identity start stays one. One with some of them raises ValueError, naming those it lacks or has too many.

    Attributes:
        spec: What the model carries.
        sites: Where it carries it.
        replaced: Keys of the tensors that gave way to attention, with their shapes; dropped from a plain backbone's
            checkpoint. Some may be called and shaped as the layers' own are.
        empty_slots: Paths that stayed empty because of `attn_stages`; a checkpoint must not have weights there.
        layers: By path, layers of which the model has the weights only: fx takes modules apart.
    """

    spec: AttnSpec
    sites: tuple[Site, ...]
    replaced: tuple[tuple[str, torch.Size], ...] = ()
    empty_slots: tuple[str, ...] = ()
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

    def moved(self, paths: dict[str, str], layers: Mapping[str, nn.Module]) -> "LoadGuard":
        """Return the guard of a wrapper that holds parts of the model, given their paths there."""
        return replace(
            self,
            sites=tuple(moved_site(site, paths) for site in self.sites),
            replaced=tuple((moved(key, paths), shape) for key, shape in self.replaced),
            empty_slots=tuple(moved(slot, paths) for slot in self.empty_slots),
            layers=layers,
        )

    def __call__(
        self, model: nn.Module, state_dict: StateDict, prefix: str, local_metadata: dict[str, Any], *_: Any
    ) -> None:
        self._drop_replaced(model, state_dict, prefix)
        self._reject_foreign(state_dict, prefix)
        own = self._layer_tensors(model, prefix)
        missing = [key for key in own if key not in state_dict]
        if missing and len(missing) == len(own):
            self._complete_plain(model, state_dict, prefix, local_metadata.get("assign_to_params_buffers", False))
        elif missing:
            raise ValueError(
                f"The checkpoint has {len(own) - len(missing)} of {len(own)} attention weights and lacks"
                f" {some(missing)}. Accepted: all of them, or none (a plain backbone's checkpoint)."
            )

    def _layer_tensors(self, model: nn.Module, prefix: str) -> StateDict:
        sites = self._sites_of(model)
        layers = {f"{prefix}{site.path}.": model.get_submodule(site.path) for site in sites}
        tensors = {path + key: tensor for path, layer in layers.items() for key, tensor in layer.state_dict().items()}
        return tensors | {prefix + site.gain: model.get_buffer(site.gain) for site in sites if site.gain}

    def _sites_of(self, model: nn.Module) -> list[Site]:
        """The sites that are left: timm's feature extraction cuts off what comes after the last feature."""
        return [site for site in self.sites if lookup(model, site.path) is not None]

    def _drop_replaced(self, model: nn.Module, state_dict: StateDict, prefix: str) -> None:
        own = self._layer_tensors(model, prefix)
        found = [(prefix + key, shape) for key, shape in self.replaced if _has(state_dict, prefix + key, shape)]
        shared = {key for key, shape in found if _has(own, key, shape)}
        only_shared = bool(shared) and {key for key in own if key in state_dict} == shared != own.keys()
        # A tensor of an old shape tells whose the shared ones are; so does a checkpoint that has these and no others.
        if len(found) == len(shared) and not only_shared:
            return
        dropped = [key for key, _ in found]
        for key in dropped:
            del state_dict[key]
        _logger.info("Dropped %d weights of modules that attention replaced: %s.", len(dropped), some(dropped))

    def _reject_foreign(self, state_dict: StateDict, prefix: str) -> None:
        slots = tuple(f"{prefix}{slot}." for slot in self.empty_slots)
        foreign = [key for key in state_dict if slots and key.startswith(slots)]
        if foreign:
            raise ValueError(
                f"The checkpoint has {len(foreign)} attention weights outside attn_stages={self.spec.attn_stages}:"
                f" {some(foreign)}."
            )

    def _complete_plain(self, model: nn.Module, state_dict: StateDict, prefix: str, assign: bool) -> None:
        if self.spec.attn_init == "identity":
            for site in self._sites_of(model):
                layer: Any = self.layers[site.path] if site.path in self.layers else model.get_submodule(site.path)
                _keep_identity(model, layer, state_dict, prefix, site)
        own = self._layer_tensors(model, prefix)
        for key, tensor in own.items():
            state_dict.setdefault(key, tensor)
        without_values = [key for key, tensor in own.items() if assign and tensor.is_meta]
        for key in without_values:
            del state_dict[key]  # so that load_state_dict reports it missing
        if without_values:
            return
        _logger.info(
            "The checkpoint has no attention weights: the %d %r layers keep their initial values.",
            len(self._sites_of(model)),
            self.spec.name,
        )


def _keep_identity(model: nn.Module, layer: Any, state_dict: StateDict, prefix: str, site: Site) -> None:
    """Scale the incoming weights as the layer's identity start needs it; the caller's tensors stay as they are."""
    if f"{prefix}{tensor_key(model, site.like)}" not in state_dict:
        return  # not this block's weights: a lenient load of a part
    factor = layer.identity_init_()
    for path in site.scales:
        key = prefix + path.lstrip("/")
        if key in state_dict:  # load_state_dict reports what is missing
            state_dict[key] = state_dict[key] * (1 / factor if path.startswith("/") else factor)
    if site.gain:
        state_dict[prefix + site.gain] = torch.full_like(model.get_buffer(site.gain), factor)


def _has(state_dict: StateDict, key: str, shape: torch.Size) -> bool:
    return key in state_dict and state_dict[key].shape == shape

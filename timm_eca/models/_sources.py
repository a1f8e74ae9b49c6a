"""Where `pretrained=True` finds the weights of this package's models, and that they are checked before timm loads them.

In this order: a folder below TIMM_ECA_WEIGHTS; the repository `timm-eca/<model>.<tag>`, or TIMM_ECA_HUB_ORG's. Classes
and preprocessing are what is saved with the weights there. What a caller names instead (`pretrained_cfg_overlay`,
'hf-hub:...', 'local-dir:...') comes first.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, resolve_pretrained_cfg

from ..errors import MissingWeightsError, WeightsError
from ..fit import check_fit
from ..hub_cache import hub_folder
from ..weights import check_folder, read_config
from .released import RELEASED

__all__ = ["checked_source", "default_source", "hub_id", "name_source"]

HUB_ORG = "timm-eca"


def hub_id(published: str, org: str = HUB_ORG) -> str:
    """Return the repository of a published name such as 'eca_resnet50.ecanet_in1k'."""
    return f"{org}/{published}"


def _published(cfg: PretrainedCfg) -> str:
    return f"{cfg.architecture}.{cfg.tag}"


def _own_hub_id(cfg: PretrainedCfg) -> str:
    return hub_id(_published(cfg), os.environ.get("TIMM_ECA_HUB_ORG") or HUB_ORG)


def default_source(name: str, given: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """Return a model's cfg, of which the organisation is that of TIMM_ECA_HUB_ORG unless another source is named.

    Args:
        name: Name of the model.
        given: The cfg, or its tag, that `timm.create_model` was given, or has read in a repository. None: the default.
        overlay: What the caller wants otherwise in it.
    """
    if isinstance(given, dict) and given.get("source"):  # a repository's config says nothing of where weights are
        given = {key: value for key, value in given.items() if key not in ("state_dict", "hf_hub_filename")}
    cfg = resolve_pretrained_cfg(name, given, overlay)
    is_default = not cfg.source and cfg.hf_hub_id == hub_id(_published(cfg))
    return dataclasses.replace(cfg, hf_hub_id=_own_hub_id(cfg)) if is_default else cfg


def checked_source(
    cfg: PretrainedCfg, cache_dir: Any, backbone: str, overlay: dict[str, Any] | None = None
) -> PretrainedCfg:
    """Return a cfg whose source is a folder with checked weights; one with a file of the caller's own as it is.

    Args:
        cfg: A model's cfg.
        cache_dir: The Hub's cache, by default huggingface_hub's.
        backbone: The model's backbone, by whose name plain timm can load the weights if they are portable.
        overlay: What the caller wants otherwise than it is saved with the weights.

    Raises:
        WeightsError: If there are no weights, they cannot be reached, they are not what they should be, or they are
            another model's.
    """
    if cfg.source == "local-dir":
        check_folder(Path(str(cfg.file)))
        return cfg
    if cfg.state_dict or (cfg.file and not cfg.source) or cfg.hf_hub_filename or not cfg.hf_hub_id:
        return cfg
    folder = _lab_folder(cfg) or _folder_from_hub(cfg, cache_dir)
    if cfg.source:  # timm has read the config there
        return dataclasses.replace(cfg, source="local-dir", file=str(folder))
    return _as_saved(folder, str(cfg.architecture), backbone, overlay)


def _as_saved(folder: Path, name: str, backbone: str, overlay: dict[str, Any] | None) -> PretrainedCfg:
    """Return the cfg that a folder has for its weights, after a look whether these are the model's."""
    config = read_config(folder)
    check_fit(folder, config, folder)
    found = config["architecture"]
    if found != (backbone if config.get("portable") else name):
        raise WeightsError(f"{folder} holds a {found}, not a {name}.")
    saved = {**(config.get("pretrained_cfg") or {}), "source": "local-dir", "file": str(folder), "architecture": name}
    saved |= {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    channels = config.get("model_args", {}).get("in_chans")
    if channels is not None:
        saved["input_size"] = (channels, *saved["input_size"][1:])
    return resolve_pretrained_cfg(name, saved, overlay)


def _lab_folder(cfg: PretrainedCfg) -> Path | None:
    """Return a model's folder below TIMM_ECA_WEIGHTS, checked, or None where none is asked for or there."""
    root = os.environ.get("TIMM_ECA_WEIGHTS")
    if not root or cfg.source or cfg.hf_hub_id != _own_hub_id(cfg):
        return None
    if not Path(root).expanduser().is_dir():
        raise WeightsError(f"TIMM_ECA_WEIGHTS must be a folder that holds models in Hub format, got {root!r}.")
    for name in (_published(cfg), cfg.architecture):
        folder = Path(root).expanduser() / str(name)
        if folder.is_dir():
            check_folder(folder)
            return folder
    return None


def _folder_from_hub(cfg: PretrainedCfg, cache_dir: Any) -> Path:
    try:
        return hub_folder(str(cfg.hf_hub_id), cache_dir=cache_dir)
    except MissingWeightsError as error:
        raise MissingWeightsError(f"{error} {_how_to_get(cfg)}") from error


def _how_to_get(cfg: PretrainedCfg) -> str:
    name = cfg.architecture
    if name not in RELEASED:
        return f"The paper's authors released no weights of {name}: train it, with pretrained=False."
    return (
        f"The weights of {name} are files of the paper's authors ({cfg.origin_url}), which must be converted:"
        f" timm-eca convert CHECKPOINT DIR/{_published(cfg)} --model {_published(cfg)}, then set TIMM_ECA_WEIGHTS=DIR."
    )


def name_source(model: Any, cfg: PretrainedCfg) -> None:
    """Make a model's cfg name the source that was asked for, not the place in the cache it was loaded from."""
    for key in ("file", "source", "hf_hub_id"):
        model.pretrained_cfg.pop(key, None)
        if getattr(cfg, key) is not None:
            model.pretrained_cfg[key] = getattr(cfg, key)

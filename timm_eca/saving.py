"""Writing a model as a folder in Hub format: timm's config.json with the attention spec, safetensors, a model card."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import nn

from .cards import model_card
from .errors import IntegrityError, WeightsError
from .fit import check_fit
from .models.released import RELEASED
from .outputs import whole_folder
from .portable import kernel_sizes, portable_form
from .timm_hooks import save_config_for_hf
from .weights import CARD, CONFIG, WEIGHTS, read_config, sha256_of

__all__ = ["FILES", "describe", "save", "write_folder"]

FILES = (CONFIG, WEIGHTS, CARD)


def save(
    model: nn.Module,
    out: str | Path,
    *,
    portable: bool | None = None,
    card: str | None = None,
    released: str | None = None,
    origin: str | None = None,
    model_config: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
) -> Path:
    """Write a model as a folder in Hub format: config.json, model.safetensors, README.md. It appears whole or not.

    Args:
        model: A timm classifier, with attention of this package or without.
        out: The folder: new, empty, or in Hub format, which is replaced.
        portable: Write a config that plain timm loads too. None: where that is possible.
        card: Text of the model card. None: one is written from the config.
        released: Name of the released model that the weights are, for the card.
        origin: One sentence for the card on where the weights come from.
        model_config: Further entries of config.json, as timm's `save_for_hf` takes them.
        data_config: Preprocessing that goes with the weights, as timm's `save_for_hf` takes it.

    Raises:
        ValueError: If the model is no timm classifier, or has been changed so that its config makes another, plain
            timm cannot express it although portable=True, an argument of it is no JSON, `released` names no released
            model, or the folder cannot be replaced.
    """
    model = _saveable(model)
    if released is not None and released not in RELEASED:
        raise ValueError(f"released must be one of {', '.join(RELEASED)}, got {released!r}.")
    out = Path(out).expanduser()
    with whole_folder(out, "timm_eca.hub.save", FILES, replaceable=_in_hub_format) as folder:
        config = describe(model, portable, model_config=model_config, data_config=data_config)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, by another name
            raise OSError(str(error)) from error
        size = (folder / WEIGHTS).stat().st_size
        config["weights"] = {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS), "size": size}
        text = card or model_card(out.name, config, _count(model), released=released, origin=origin)
        write_folder(folder, config, text)
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors may write files that only their owner reads
        _check_rebuilt(folder, config)
    return out


def _check_rebuilt(folder: Path, config: dict[str, Any]) -> None:
    try:
        check_fit(folder, config, "The model is not the one that its config describes")
    except IntegrityError as error:
        raise ValueError(
            f"{error}. A classifier is changed by reset_classifier, and the model saved before parts of it are compiled"
            " or exchanged."
        ) from error


def write_folder(folder: Path, config: dict[str, Any], card: str) -> None:
    """Write the two text files of a folder in Hub format."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def _saveable(model: nn.Module) -> nn.Module:
    model = getattr(unwrap_model(model), "_orig_mod", unwrap_model(model))
    if not hasattr(model, "pretrained_cfg") or not hasattr(model, "num_classes"):
        raise ValueError(f"Only a timm classifier can be saved in Hub format, got {type(model).__name__}.")
    return model


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _in_hub_format(folder: Path) -> bool:
    try:
        read_config(folder)
    except (OSError, WeightsError):
        return False
    return (folder / WEIGHTS).is_file()


def describe(
    model: nn.Module,
    portable: bool | None = None,
    *,
    model_config: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a model's config.json but for the digest of its weights: timm's, and the attention spec.

    Arguments and errors as `save`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(model, str(path), model_config=model_config, data_config=data_config)
        config = json.loads(path.read_text(encoding="utf-8"))
    form = portable_form(model, config) if portable is not False else None
    if portable and form is None:
        raise ValueError(
            "portable=True needs a ResNet of timm with 'eca' of adaptive kernel size and sigmoid in every stage, or a"
            f" model without attention of this package; got {config['architecture']} with {model.attn_spec}."
        )
    config = dict(form or config)
    if hasattr(model, "attn_spec"):
        config["attn"] = model.attn_spec.as_args()  # type: ignore[operator,union-attr]
        config["kernel_sizes"] = kernel_sizes(model)
        config["portable"] = form is not None
    return config

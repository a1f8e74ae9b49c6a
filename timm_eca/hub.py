"""Sharing models with attention: save, push, load, verify, in timm's Hub format, with the sha256 of the weights.

Safetensors only: no pickle is written or read.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import unwrap_model
from torch import nn

from .cards import model_card
from .errors import IntegrityError, WeightsError
from .outputs import whole_folder
from .portable import kernel_sizes, portable_form
from .timm_hooks import save_config_for_hf
from .weights import CARD, CONFIG, WEIGHTS, check_folder, explain, hub_folder, sha256_of, split_hub_id

__all__ = ["describe", "load", "push", "save", "verify", "write_folder"]

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
        ValueError: If the model is no timm classifier, plain timm cannot express it although portable=True, an
            argument of it is no JSON, or the folder cannot be replaced.
    """
    model = _saveable(model)
    out = Path(out)
    with whole_folder(out, "timm_eca.hub.save", replaceable=_in_hub_format) as folder:
        config = describe(model, portable, model_config=model_config, data_config=data_config)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        size = (folder / WEIGHTS).stat().st_size
        config["weights"] = {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS), "size": size}
        text = card or model_card(out.name, config, _count(model), released=released, origin=origin)
        write_folder(folder, config, text)
    return out


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
    return {path.name for path in folder.iterdir()} <= set(FILES)


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


def push(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Add model",
    **save_args: Any,
) -> str:
    """Upload a model, or a folder that `save` wrote, as one commit, and return the commit's URL.

    A folder is checked first and uploaded as it is. The card written for a model never replaces one that the
    repository has. Files that are there already are not sent again.

    Args:
        source: A model, or a folder in Hub format.
        repo_id: 'org/name'; made if it does not exist.
        private: Make a new repository private.
        revision: Branch to commit to, which must exist. None: the main branch.
        create_pr: Open a pull request instead of committing to the branch.
        token: As huggingface_hub takes it.
        commit_message: First line of the commit.
        **save_args: For a model, arguments of `save`.

    Raises:
        ValueError: If repo_id is no such name, or the model cannot be saved.
        WeightsError: If the folder fails the check, or the Hub refuses or cannot be reached.
    """
    repo, at_revision = split_hub_id(repo_id)
    if at_revision:
        raise ValueError(f"Give the branch as revision={at_revision!r}, not in the name {repo_id!r}.")
    with _folder_of(source, repo, save_args) as folder:
        check_folder(folder, digest_required=True)
        api = HfApi(token=token, library_name="timm-eca")
        with _explained(repo):
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            files = list(FILES)
            if isinstance(source, nn.Module) and api.file_exists(repo, CARD, revision=revision):
                files.remove(CARD)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=files,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
    return commit.pr_url or commit.commit_url


@contextlib.contextmanager
def _folder_of(source: nn.Module | str | Path, repo: str, save_args: dict[str, Any]) -> Iterator[Path]:
    if not isinstance(source, nn.Module):
        if save_args:
            raise ValueError(f"{', '.join(save_args)} are for a model; {source} is a folder that is saved already.")
        yield Path(source)
        return
    scratch = Path(tempfile.mkdtemp())
    try:
        yield save(source, scratch / repo.rpartition("/")[2], **save_args)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise explain(error, repo, "the upload") or WeightsError(f"{repo}: {error}") from error


def load(source: str | Path, *, cache_dir: Any = None, token: str | bool | None = None, **kwargs: Any) -> nn.Module:
    """Return a model from the Hub or a folder, with its weights, checked before they are used.

    Args:
        source: 'org/name', 'org/name@revision' or a folder in Hub format.
        cache_dir: The Hub's cache, by default huggingface_hub's.
        token: As huggingface_hub takes it.
        **kwargs: As `timm.create_model` takes them: num_classes, in_chans, features_only, drop_rate, ...

    Raises:
        ValueError: If source is neither, or the arguments do not fit the model.
        WeightsError: If the weights are missing, not reachable, or not what they should be.
    """
    folder = _locate(source, cache_dir, token)
    config = check_folder(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **{**_attn_args(config), **kwargs})
    if folder != Path(source):
        model.pretrained_cfg.pop("file", None)  # type: ignore[operator,union-attr]
        model.pretrained_cfg.update(source="hf-hub", hf_hub_id=str(source))  # type: ignore[operator,union-attr]
    return model


def _attn_args(config: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a portable config's model one with attention of this package, its spec included."""
    if not config.get("portable"):
        return {}
    block_args = {k: v for k, v in config["model_args"]["block_args"].items() if k != "attn_layer"}
    return {**config["attn"], "block_args": block_args}


def _locate(source: str | Path, cache_dir: Any = None, token: Any = None, digest_required: bool = False) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {source}.")
    return hub_folder(source, cache_dir=cache_dir, token=token, digest_required=digest_required)


def verify(source: str | Path, *, cache_dir: Any = None, token: str | bool | None = None) -> dict[str, Any]:
    """Check weights against the recorded sha256 and against the model that the config describes.

    Returns:
        architecture, sha256, size in bytes, number of tensors, kernel sizes per stage (None without ECA).

    Raises:
        ValueError: If source is neither folder nor repository name.
        WeightsError: If there is no digest, it differs, or tensors' names or shapes do not fit the model.
    """
    folder = _locate(source, cache_dir, token, digest_required=True)
    config = check_folder(folder, digest_required=True)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    model = timm.create_model(f"local-dir:{folder}", device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise IntegrityError(
            f"{source}: {len(wrong)} of {len(expected)} tensors do not fit {config['architecture']}: "
            + "; ".join(f"{n} is {found.get(n, 'absent')}, not {expected.get(n, 'there')}" for n in wrong[:4])
        )
    return {
        "architecture": config["architecture"],
        **config["weights"],
        "tensors": len(found),
        "kernel_sizes": config.get("kernel_sizes"),
    }

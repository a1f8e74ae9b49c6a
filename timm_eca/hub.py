"""Sharing models with attention: save, push, load, verify, in timm's Hub format, with the sha256 of the weights.

Safetensors only: no pickle is written or read.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi
from torch import nn

from .errors import IntegrityError, WeightsError
from .fit import attn_args, check_fit
from .hub_cache import hub_folder, split_hub_id
from .hub_errors import UPLOAD, explain, with_retries
from .models import ENTRYPOINTS
from .saving import FILES, describe, save, write_folder
from .timm_hooks import installed
from .weights import CARD, WEIGHTS, check_folder, read_config, recorded_digest

__all__ = ["describe", "load", "push", "save", "verify", "write_folder"]


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

    A folder is checked first and uploaded as it is. A card that this package writes for a model never replaces one that
    the repository has. Files that are there already are not sent again.

    Args:
        source: A model, or a folder in Hub format.
        repo_id: 'org/name'; made if it does not exist.
        private: Make a new repository private, and refuse one that is there and public. Otherwise a new one is what
            its owner's default says.
        revision: Branch to commit to, made from the main branch if it does not exist. None: the main branch.
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
    with _folder_of(source, repo, save_args) as folder, _explained(repo):
        config = check_folder(folder, digest_required=True)
        if not isinstance(source, nn.Module):  # `save` has checked a model
            check_fit(folder, config, source)
        api = HfApi(token=token, library_name="timm-eca", library_version=version("timm-eca"))
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise WeightsError(f"{repo} is there already and public: nothing was uploaded.")
        if revision and not create_pr and not api.revision_exists(repo, revision):
            api.create_branch(repo, branch=revision)
        files = list(FILES)
        made_here = isinstance(source, nn.Module) and not save_args.get("card")
        if made_here and api.file_exists(repo, CARD, revision=revision):
            files.remove(CARD)

        def commit() -> Any:  # one commit, whatever the client's default: config and weights belong together
            operations = [CommitOperationAdd(name, folder / name) for name in files if (folder / name).is_file()]
            return api.create_commit(
                repo, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
            )

        # Once again is harmless, as what is there already is left out, except that it could open a second pull request.
        done = commit() if create_pr else with_retries(commit, repo, UPLOAD)
    return done.pr_url or done.commit_url


@contextlib.contextmanager
def _folder_of(source: nn.Module | str | Path, repo: str, save_args: dict[str, Any]) -> Iterator[Path]:
    if not isinstance(source, nn.Module):
        if save_args:
            raise ValueError(f"{', '.join(save_args)} are for a model; {source} is a folder that is saved already.")
        yield Path(source).expanduser()
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
        raise explain(error, repo, UPLOAD) from error


def load(source: str | Path, *, cache_dir: Any = None, token: str | bool | None = None, **kwargs: Any) -> nn.Module:
    """Return a model from the Hub or a folder, with its weights, checked before they are used.

    Args:
        source: 'org/name', 'org/name@revision' or a folder in Hub format.
        cache_dir: The Hub's cache, by default huggingface_hub's.
        token: As huggingface_hub takes it.
        **kwargs: As `timm.create_model` takes them: num_classes, in_chans, features_only, drop_rate, ...

    Raises:
        ValueError: If source is neither, the arguments do not fit the model, or the model has attention and the
            package is uninstalled.
        WeightsError: If the weights are missing, not reachable, or not what they should be.
    """
    folder, config = _checked(source, cache_dir, token)
    if recorded_digest(config):  # so `save` wrote it; others may hold an older layout, which timm renames
        check_fit(folder, config, source)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **{**attn_args(config, source), **kwargs})
    if folder != Path(source).expanduser():
        model.pretrained_cfg.pop("file", None)  # type: ignore[operator,union-attr]
        model.pretrained_cfg.update(source="hf-hub", hf_hub_id=str(source))  # type: ignore[operator,union-attr]
    return model


def _checked(
    source: str | Path, cache_dir: Any, token: Any, digest_required: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Return the folder that source names or that its files were downloaded to, and its config, after the check."""
    local = Path(source).expanduser()
    if local.is_dir():
        folder, config = local, check_folder(local, digest_required=digest_required)
    elif isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {source}.")
    else:
        try:
            folder = hub_folder(source, cache_dir=cache_dir, token=token)
        except ValueError as error:
            raise ValueError(f"There is no folder {source}. {error}") from None
        config = read_config(folder)
    if not installed() and ("attn" in config or config["architecture"] in [e.__name__ for e in ENTRYPOINTS]):
        raise ValueError(f"{source} has attention, and timm_eca is uninstalled: call timm_eca.install() first.")
    if not timm.is_model(config["architecture"]):
        raise WeightsError(f"{source} is a {config['architecture']!r}, which timm {timm.__version__} does not have.")
    return folder, config


def verify(source: str | Path, *, cache_dir: Any = None, token: str | bool | None = None) -> dict[str, Any]:
    """Check weights against the recorded sha256 and against the model that the config describes.

    Returns:
        architecture, sha256, size in bytes, number of tensors, kernel sizes per stage (None without ECA).

    Raises:
        ValueError: If source is neither folder nor repository name, or the model has attention and the package is
            uninstalled.
        WeightsError: If there is no digest, it differs, or tensors' names or shapes do not fit the model.
    """
    folder, config = _checked(source, cache_dir, token, digest_required=True)
    sha256 = recorded_digest(config)
    if sha256 is None:
        raise IntegrityError(f"{source} records no sha256 of its weights: nothing tells whether they are intact.")
    tensors = check_fit(folder, config, source)
    return {
        "architecture": config["architecture"],
        "sha256": sha256,
        "size": (folder / WEIGHTS).stat().st_size,
        "tensors": tensors,
        "kernel_sizes": config.get("kernel_sizes"),
    }

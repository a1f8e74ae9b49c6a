"""Folders in Hub format from the Hub: downloaded into its cache and checked; what is damaged leaves the cache."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import validate_repo_id

from .errors import IntegrityError
from .hub_errors import with_retries
from .weights import (
    CONFIG,
    WEIGHTS,
    check_blob,
    check_folder,
    is_damaged,
    is_named,
    links_of,
    read_config,
    recorded_digest,
)

__all__ = ["hub_folder", "split_hub_id"]


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """Split 'org/name@rev' into repository and revision.

    Raises:
        ValueError: If it is no such name.
    """
    repo, at, revision = hub_id.partition("@")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"A repository is named 'org/name' or 'org/name@revision', got {hub_id!r}: {error}") from None
    if "/" not in repo or (at and not revision):
        raise ValueError(f"A repository is named 'org/name' or 'org/name@revision', got {hub_id!r}.")
    return repo, revision or None


def hub_folder(hub_id: str, *, cache_dir: Any = None, token: Any = None) -> Path:
    """Return the folder in the Hub's cache that holds one commit's config and weights, downloaded and checked.

    A damaged file leaves the cache, so that the next call downloads it afresh; files that were published so stay.

    Args:
        hub_id: 'org/name' or 'org/name@revision'.
        cache_dir: The cache, by default huggingface_hub's.
        token: As huggingface_hub takes it.

    Raises:
        WeightsError: If the repository or a file is missing, not allowed or not reachable, or fails the check.
    """
    repo, revision = split_hub_id(hub_id)

    def download(filename: str, revision: str | None) -> Path:
        options = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return Path(with_retries(lambda: hf_hub_download(repo, filename, **options), hub_id, filename))

    config = download(CONFIG, revision)
    folder = config.parent  # snapshots/<commit>: the weights must be of the same commit
    with _fate_told(hub_id, config):  # before the weights, which may be large and of no model of timm
        check_blob(config)
        recorded = recorded_digest(read_config(folder))
    weights = download(WEIGHTS, folder.name)
    with _fate_told(hub_id, weights, recorded):
        check_folder(folder)
    return folder


@contextlib.contextmanager
def _fate_told(hub_id: str, path: Path, recorded: str | None = None) -> Iterator[None]:
    """Remove a file that fails its check from the cache if it is damaged, and say in the error what became of it."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"{hub_id}: {error} {_fate(path, recorded)}") from None


def _fate(path: Path, recorded: str | None) -> str:
    if is_damaged(path, recorded):
        return _evict(path)
    if is_named(path):
        return "It is as it was published: nothing was removed from the cache, and another download would not help."
    return f"Nothing was removed from the cache; if {path} is damaged, remove it."


def _evict(path: Path) -> str:
    """Remove a file from the cache, and return in words whether that was done and what to do next."""
    repo = path.parents[2]  # .../models--org--name/snapshots/<commit>/<file>
    roots = [repo.resolve(), (repo.parent / "blobs").resolve()]  # the second: where all repositories share blobs

    def ours(place: Path) -> bool:
        return any(place.is_relative_to(root) for root in roots)

    if not ours(path.resolve()):  # a link that somebody made to a file of his own
        return f"It lies outside the cache, at {path.resolve()}: nothing was removed."
    links = [link for link in links_of(path) if ours(link.parent.resolve())]
    try:
        for link in links:
            link.unlink(missing_ok=True)
    except OSError as error:
        return (
            f"It cannot be removed from the cache ({error.strerror or error}): remove {links[-1]}, or use another cache"
            " (cache_dir, or HF_HUB_CACHE)."
        )
    return "It was removed from the cache; try again."

"""Folders in Hub format from the Hub: downloaded into its cache and checked; what fails the check leaves the cache."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import validate_repo_id

from .errors import IntegrityError
from .hub_errors import with_retries
from .weights import CONFIG, WEIGHTS, check_folder, check_small_file, links_of

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

    A file that fails the check leaves the cache, so that the next call downloads it afresh.

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
    files = [config]
    try:
        check_small_file(config)
        files.append(download(WEIGHTS, folder.name))
        check_folder(folder)
    except IntegrityError as error:
        raise IntegrityError(f"{hub_id}: {error} {_evict(files)}") from None
    return folder


def _evict(files: list[Path]) -> str:
    """Remove files from the cache, and return in words whether that was possible and what to do next."""
    links = [link for path in files for link in links_of(path)]
    try:
        for link in links:
            link.unlink(missing_ok=True)
    except OSError as error:
        contents = " and ".join(str(links_of(path)[-1]) for path in files)
        return (
            f"It cannot be removed from the cache ({error.strerror or error}): remove {contents}, or use another cache"
            " (cache_dir, or HF_HUB_CACHE)."
        )
    return "It was removed from the cache; try again."

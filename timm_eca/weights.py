"""Weights that are what they say: folders in Hub format, checked before a tensor is used.

The Hub's client checks a file's size, not its content: a flipped bit loads, stays in the cache and loads again. So
`config.json` holds the sha256 of the weights, and every way in through this package compares it.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .errors import IntegrityError, MissingWeightsError, WeightsError

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "check_folder",
    "explain",
    "hub_folder",
    "read_config",
    "sha256_of",
    "split_hub_id",
    "with_retries",
]

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ATTEMPTS = 3
RETRY_SECONDS = 1.0


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return _digest_of(path, hashlib.sha256())


def _digest_of(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder in Hub format.

    Raises:
        MissingWeightsError: If folder or file do not exist.
        IntegrityError: If the file is no JSON object with an architecture.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingWeightsError(
            f"{folder} is no folder in Hub format: it has no {CONFIG}. Needed: {CONFIG} and {WEIGHTS}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise IntegrityError(f"{path} is no model's config: it names no architecture.")
    return config


def check_folder(folder: Path, *, digest_required: bool = False) -> dict[str, Any]:
    """Compare the weights of a folder in Hub format with the digest in its config, and return the config.

    A folder whose config has no digest (timm writes none) passes with a warning, unless digest_required.

    Raises:
        MissingWeightsError: If config or weights are not there.
        IntegrityError: If the digest differs or is required and absent, or the safetensors header is broken.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise MissingWeightsError(f"{folder} has no {WEIGHTS}; other formats than safetensors are not read.")
    expected = _recorded_digest(config) or _digest_in_blob_name(path)
    actual = sha256_of(path)
    if expected is None and digest_required:
        raise IntegrityError(f"{folder / CONFIG} records no sha256 of {WEIGHTS}, which has {actual}.")
    if expected is None:
        _logger.warning("%s records no sha256: %s is used unchecked.", folder / CONFIG, WEIGHTS)
    elif actual != expected:
        raise IntegrityError(f"{path} is not what it should be: its sha256 is {actual}, {CONFIG} says {expected}.")
    _check_header(path)
    return config


def _recorded_digest(config: dict[str, Any]) -> str | None:
    weights = config.get("weights")
    digest = weights.get("sha256") if isinstance(weights, dict) else None
    if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
        raise IntegrityError(f"{CONFIG} records {digest!r} as sha256 of {WEIGHTS}; that is no sha256.")
    return digest


def _digest_in_blob_name(path: Path) -> str | None:
    """Return the digest by which the Hub's cache names a file: sha256 of a large file, git's sha1 of a small one."""
    real = path.resolve()
    in_cache = real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", real.name)
    return real.name if in_cache else None


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
    except SafetensorError as error:
        raise IntegrityError(f"{path} is no intact safetensors file: {error}.") from None
    if not names:
        raise IntegrityError(f"{path} holds no tensors.")


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


def hub_folder(hub_id: str, *, cache_dir: Any = None, token: Any = None, digest_required: bool = False) -> Path:
    """Return the folder in the Hub's cache that holds one commit's config and weights, downloaded and checked.

    A file that fails the check leaves the cache, so that the next call downloads it afresh.

    Args:
        hub_id: 'org/name' or 'org/name@revision'.
        cache_dir: The cache, by default huggingface_hub's.
        token: As huggingface_hub takes it.
        digest_required: Refuse a config without digest.

    Raises:
        WeightsError: If the repository or a file is missing, not allowed or not reachable, or fails the check.
    """
    repo, revision = split_hub_id(hub_id)

    def download(filename: str, revision: str | None) -> Path:
        options = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return Path(with_retries(lambda: hf_hub_download(repo, filename, **options), hub_id, filename))

    config = download(CONFIG, revision)
    _check_small_file(config)
    commit = config.parent.name  # snapshots/<commit>/config.json: the weights must be of the same commit
    weights = download(WEIGHTS, commit)
    try:
        check_folder(config.parent, digest_required=digest_required)
    except IntegrityError as error:
        _evict(config)
        _evict(weights)
        raise IntegrityError(f"{hub_id}: {error} It was removed from the cache; try again.") from None
    return config.parent


def _check_small_file(path: Path) -> None:
    recorded = _digest_in_blob_name(path)
    if recorded is None or len(recorded) != 40:
        return
    actual = _digest_of(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))
    if actual != recorded:
        _evict(path)
        raise IntegrityError(
            f"{path} is damaged: its git digest is {actual}, the Hub named it {recorded}. It was removed from the"
            " cache; try again."
        )


def _evict(path: Path) -> None:
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def with_retries(call: Callable[[], Any], hub_id: str, filename: str) -> Any:
    """Make a call to the Hub, again where the failure is a passing one, and explain an error that stays."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _passing(error):
                raise explain(error, hub_id, filename) or error from error
            _logger.warning("%s of %s: %s. Trying again.", filename, hub_id, _first_line(error))
            time.sleep(RETRY_SECONDS * attempt)


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub's HTTP library raises for a broken connection; the library is not always the same."""
    import huggingface_hub.utils

    httpx = getattr(huggingface_hub.utils, "httpx", None)
    return (httpx.TransportError,) if httpx else (ConnectionError,)


def _passing(error: Exception) -> bool:
    if isinstance(error, _transport_errors()) or "Consistency check failed" in str(error):
        return True
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(error, HfHubHTTPError) and status >= 500


def explain(error: Exception, hub_id: str, filename: str) -> WeightsError | None:
    """Return a failure of the Hub's client in one line that says what to do, or None if it is not one."""
    where = f"{hub_id} on {constants.ENDPOINT}"
    if isinstance(error, GatedRepoError):
        return WeightsError(f"{where} is gated: ask for access on its page, then log in (hf auth login, or HF_TOKEN).")
    if isinstance(error, RepositoryNotFoundError):
        return MissingWeightsError(f"{where} does not exist, or is private and HF_TOKEN or hf auth login is needed.")
    if isinstance(error, RevisionNotFoundError):
        return MissingWeightsError(f"{where} has no such revision.")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return WeightsError(f"{filename} of {where} is not in the cache, and the Hub is offline or cannot be reached.")
    if isinstance(error, EntryNotFoundError):
        return MissingWeightsError(f"{where} has no {filename}.")
    if isinstance(error, (OSError, *_transport_errors())):
        return WeightsError(f"{filename} of {where}: {_first_line(error)}")
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]

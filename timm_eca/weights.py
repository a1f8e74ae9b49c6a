"""Weights that are what they say: folders in Hub format, checked before a tensor is used.

The Hub's client checks a file's size, not its content: a flipped bit loads, stays in the cache and loads again. So
`config.json` holds the sha256 of the weights, and every way in through this package compares it.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import IntegrityError, MissingWeightsError, WeightsError

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "check_blob",
    "check_folder",
    "is_damaged",
    "is_named",
    "links_of",
    "read_config",
    "recorded_digest",
    "sha256_of",
]

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
_THE_HUB = "the Hub's name of the file"
_LFS_POINTER = b"version https://git-lfs"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return _digest_of(path, hashlib.sha256())


def _digest_of(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Make a failure to read, such as a file of another user, an error of weights."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename} cannot be read: " if error.filename else "The weights cannot be read: "
        raise WeightsError(f"{place}{error.strerror or error}.") from error


@_readable()
def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder in Hub format.

    Raises:
        MissingWeightsError: If folder or file do not exist.
        IntegrityError: If the file is no JSON object with an architecture.
        WeightsError: If it cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingWeightsError(
            f"{folder} is no folder in Hub format: it has no {CONFIG}. Needed: {CONFIG} and {WEIGHTS}."
        )
    _check_no_pointer(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}.") from None
    except RecursionError:
        raise IntegrityError(f"{path} is no model's config: it is nested too deeply to be read.") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise IntegrityError(f"{path} is no model's config: it names no architecture, so this is no timm model.")
    return config


def _check_no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise IntegrityError(f"{path} is git-lfs's pointer to the file, not the file: run git lfs pull.")


@_readable()
def check_folder(folder: Path, *, digest_required: bool = False) -> dict[str, Any]:
    """Compare the weights of a folder in Hub format with the digest in its config, and return the config.

    A folder whose config has no digest (timm writes none) passes with a warning, unless digest_required.

    Raises:
        MissingWeightsError: If config or weights are not there.
        IntegrityError: If the digest differs or is required and absent, or the safetensors header is broken.
        WeightsError: If a file cannot be read.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise MissingWeightsError(f"{folder} has no {WEIGHTS}; other formats than safetensors are not read.")
    _check_no_pointer(path)
    recorded = recorded_digest(config)
    named = _digest_in_blob_name(path)
    if recorded is not None:
        _compare(path, recorded, CONFIG)
    elif named is not None:
        _compare(path, named, _THE_HUB)
    elif digest_required:
        raise IntegrityError(f"{folder / CONFIG} records no sha256 of {WEIGHTS}, which has {sha256_of(path)}.")
    else:
        _logger.warning("%s records no sha256: %s is used unchecked.", folder / CONFIG, WEIGHTS)
    _check_header(path)
    return config


def recorded_digest(config: dict[str, Any]) -> str | None:
    """Return the sha256 of the weights that a config records, in small letters, None if it records none.

    Raises:
        IntegrityError: If what it records is no sha256.
    """
    weights = config.get("weights")
    digest = weights.get("sha256") if isinstance(weights, dict) else None
    if digest is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", str(digest)):
        raise IntegrityError(f"{CONFIG} records {digest!r} as sha256 of {WEIGHTS}; that is no sha256.")
    return str(digest).lower()


def links_of(path: Path) -> list[Path]:
    """Return a file and what it links to, in the Hub's cache: its blob, and where that is kept for all repositories."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / chain[-1].readlink())
    return chain


def _digest_in_blob_name(path: Path) -> str | None:
    """Return the digest by which the Hub's cache names a file: sha256 of a large file, git's sha1 of a small one."""
    for blob in links_of(path)[1:2]:
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-fA-F]{64}|[0-9a-fA-F]{40}", blob.name):
            return blob.name.lower()
    return None


def is_named(path: Path) -> bool:
    """Return whether a file of the Hub's cache has a digest for a name, so that damage to it can be told."""
    return _digest_in_blob_name(path) is not None


@_readable()
def is_damaged(path: Path, recorded: str | None = None) -> bool:
    """Return whether a file of the Hub's cache differs from the digest that names it, or, unnamed, from a recorded one.

    The name counts first: weights that fit theirs are as they were published, whatever the config says of them.
    """
    expected = _digest_in_blob_name(path) or recorded
    return expected is not None and _digest_like(expected, path) != expected


@_readable()
def check_blob(path: Path) -> None:
    """Compare a file of the Hub's cache with the digest that names it; one without passes.

    Raises:
        IntegrityError: If it differs.
        WeightsError: If it cannot be read.
    """
    named = _digest_in_blob_name(path)
    if named is not None:
        _compare(path, named, _THE_HUB)


def _compare(path: Path, expected: str, said_by: str) -> None:
    """Raise IntegrityError if a file has another digest than expected."""
    actual = _digest_like(expected, path)
    if actual != expected:
        kind = "git digest" if len(expected) == 40 else "sha256"
        raise IntegrityError(f"{path} is not what it should be: its {kind} is {actual}, {said_by} says {expected}.")


def _digest_like(other: str, path: Path) -> str:
    """Return a file's digest of the same kind as another one: git's if that has 40 digits, else the sha256."""
    return _git_digest_of(path) if len(other) == 40 else sha256_of(path)


def _git_digest_of(path: Path) -> str:
    return _digest_of(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
    except SafetensorError as error:
        raise IntegrityError(f"{path} is no intact safetensors file: {error}.") from None
    if not names:
        raise IntegrityError(f"{path} holds no tensors.")

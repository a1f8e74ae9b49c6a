"""Fetching a release's script into the user's cache: checked against its pinned sum, whole or not at all."""

import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

from ..errors import CommandError
from ..whole_file import write_whole
from .pins import SHA256

__all__ = ["REPOSITORY", "cache_folder", "cached_script"]

REPOSITORY = "https://github.com/huggingface/pytorch-image-models"
RAW_FILES = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"
BASE_URL = "TIMM_ECA_SCRIPTS_URL"
CACHE = "TIMM_ECA_CACHE"
SECONDS = 20
MOST_BYTES = 1 << 20  # timm's longest script has 70 thousand


def cache_folder() -> Path:
    """Return `$TIMM_ECA_CACHE`, or `timm_eca` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "timm_eca"


def cached_script(name: str, tag: str) -> Path:
    """Return the file of a release's script, downloaded where the cache lacks it or holds other bytes.

    Raises:
        CommandError: If it cannot be fetched or kept, or its sum is not the pinned one.
    """
    path = cache_folder() / "scripts" / tag / f"{name}.py"
    if _sum_of(path) != SHA256[tag][name]:
        _keep(path, _download(path.name, tag))
        print(f"timm-eca: downloaded {path.name} of timm {tag} to {path}", file=sys.stderr)
    return path


def _sum_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _download(file_name: str, tag: str) -> bytes:
    url = f"{os.environ.get(BASE_URL) or RAW_FILES}/{tag}/{file_name}"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:
            content = response.read(MOST_BYTES)
            missing = getattr(response, "length", None) or 0  # a body cut short is no error to read(n); files have none
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _failure(url, tag, str(getattr(error, "reason", None) or error or type(error).__name__)) from None
    if missing:
        raise _failure(url, tag, f"the answer broke off, {missing} bytes are missing")
    found, pinned = hashlib.sha256(content).hexdigest(), SHA256[tag][Path(file_name).stem]
    if found != pinned:
        raise _failure(url, tag, f"its sha256 is {found}, it must be {pinned}")
    return content


def _failure(url: str, tag: str, reason: str) -> CommandError:
    return CommandError(
        f"cannot download {url}: {reason}. Get timm's scripts with"
        f" `git clone --depth 1 --branch {tag} {REPOSITORY}` and name the folder with --timm-scripts or TIMM_SCRIPTS."
    )


def _keep(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise CommandError(
            f"cannot write to {path.parent}: {error.strerror or error}. Name another cache folder with {CACHE}."
        ) from None

"""Where a script of timm's comes from: a checkout, the cache, or a download of the release that fits."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import timm

from ..errors import CommandError
from .download import REPOSITORY, cached_script
from .pins import SHA256

__all__ = ["Script", "distance_warning", "find_script", "nearest_tag"]

CHECKOUT = "TIMM_SCRIPTS"


@dataclass(frozen=True)
class Script:
    """A script's file and the version of timm it belongs to, None where that cannot be told."""

    path: Path
    version: str | None


def find_script(name: str, folder: Path | None = None) -> Script:
    """Return the script of a name: from the folder given, from that of `TIMM_SCRIPTS`, from cache or download.

    Raises:
        CommandError: If the folder does not hold it, or there is neither a checkout nor a network.
    """
    if folder is not None:
        return _of_checkout(name, folder, "--timm-scripts")
    if os.environ.get(CHECKOUT):
        return _of_checkout(name, Path(os.environ[CHECKOUT]), CHECKOUT)
    tag = nearest_tag(name, timm.__version__)
    return Script(cached_script(name, tag), tag.removeprefix("v"))


def _of_checkout(name: str, folder: Path, given_by: str) -> Script:
    path = folder.expanduser().absolute() / f"{name}.py"
    if not path.is_file():
        raise CommandError(
            f"{given_by} is {folder}, where there is no {path.name}. It must name a checkout of timm's repository:"
            f" git clone --depth 1 --branch {nearest_tag(name, timm.__version__)} {REPOSITORY}"
        )
    return Script(path, _version_of_checkout(path.parent))


def _version_of_checkout(folder: Path) -> str | None:
    try:
        found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "timm" / "version.py").read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return found and found[1]


def nearest_tag(name: str, version: str) -> str:
    """Return timm's release tag for a version, or the nearest older one known to have a script.

    Raises:
        CommandError: If none is that old.
    """
    known = [tag for tag, sums in SHA256.items() if name in sums]
    older = [tag for tag in known if _numbers(tag) <= _numbers(version)]
    if not older:
        raise CommandError(f"timm {version} is older than all releases whose {name}.py is known: {', '.join(known)}.")
    return max(older, key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def distance_warning(script: Script, installed: str) -> str | None:
    """Return a warning if a script's version is further from the installed timm's than a minor release."""
    if script.version is None:
        return None
    theirs, ours = _numbers(script.version), _numbers(installed)
    if theirs[0] == ours[0] and abs(theirs[1] - ours[1]) <= 1:
        return None
    return f"{script.path} is of timm {script.version}, installed is timm {installed}: it may not run with it."

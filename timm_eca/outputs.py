"""A folder of results that appears whole or not at all."""

import contextlib
import fnmatch
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .errors import CommandError

__all__ = ["RESULTS", "is_made_by", "whole_folder"]

RESULTS = "results.json"


@contextlib.contextmanager
def whole_folder(
    out: Path, made_by: str, patterns: Collection[str], replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Give a fresh folder beside `out` and rename it to `out` at the end; on any error it is deleted.

    An existing `out`, or what it links to, is replaced if it is empty, or if every file in it has a path that one of
    `patterns` (of fnmatch) matches and it is replaceable, by default if its `results.json` says that the same command
    made it.

    Raises:
        CommandError: If `out` holds anything else, is the working folder or a mount point, or cannot be written.
    """
    out = Path(os.path.realpath(out.expanduser()))

    def check(folder: Path) -> None:
        is_ours = replaceable or (lambda folder: is_made_by(folder / RESULTS, made_by))
        foreign = next((p for p in _paths(folder) if not any(fnmatch.fnmatchcase(p, ours) for ours in patterns)), None)
        if foreign or (any(folder.iterdir()) and not is_ours(folder)):
            such = f", such as {foreign}" if foreign else ""
            raise CommandError(f"{out} holds other files than those of {made_by}{such}. Give a new or empty folder.")

    try:
        if os.path.lexists(out):
            _check_place(out)
            check(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror or error}. Give another folder.") from None
    try:
        yield fresh
        _swap(fresh, out, check)
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_place(out: Path) -> None:
    if not out.is_dir():
        raise CommandError(f"{out} is not a folder. Give a new or empty folder.")
    if os.path.ismount(out) or out.samefile("."):  # neither can be renamed without harm
        raise CommandError(f"{out} is a mount point or the working folder. Give a folder in it.")


def _paths(folder: Path) -> Iterator[str]:
    """Yield the paths in a folder of all files, links and empty folders."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()


def is_made_by(path: Path, made_by: str) -> bool:
    """Return whether a JSON file says that a command made it."""
    try:
        return json.loads(path.read_text()).get("made_by") == made_by
    except (OSError, ValueError, AttributeError):
        return False


def _mode_for(out: Path, fresh: Path) -> int:
    """Return the mode of the folder that is replaced, else that of any folder made here.

    A folder made for it tells that: to ask for the umask is to set it, for all threads.
    """
    if out.is_dir():
        return stat.S_IMODE(out.stat().st_mode)
    usual = fresh / ".usual"
    usual.mkdir()
    mode = stat.S_IMODE(usual.stat().st_mode)
    usual.rmdir()
    return mode


def _swap(fresh: Path, out: Path, check: Callable[[Path], None]) -> None:
    """Rename `fresh` to `out`, in place of an old folder that passes the check; on any error the old one is kept."""
    fresh.chmod(_mode_for(out, fresh))  # mkdtemp's folders are private
    try:
        fresh.rename(out)
        return  # out was new or empty
    except OSError:
        if not out.is_dir():
            raise
    holder = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    old = holder / out.name
    try:
        out.rename(old)
        try:
            check(old)  # files may have come during the run
            fresh.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            holder.rmdir()  # not where the old folder could not be put back

"""A folder of results that appears whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CommandError

__all__ = ["RESULTS", "whole_folder"]

RESULTS = "results.json"


@contextmanager
def whole_folder(out: Path, made_by: str, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Give a fresh folder beside `out` and rename it to `out` at the end; on any error it is deleted.

    An existing `out` is replaced if it is empty or replaceable, by default if its `results.json` says that the same
    command made it.

    Raises:
        CommandError: If `out` holds anything else, or cannot be written.
    """
    out = out.expanduser().absolute()
    _check_replaceable(out, made_by, replaceable or (lambda folder: _made_by(folder, made_by)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror or error}. Give another folder.") from None
    try:
        yield fresh
        _swap(fresh, out)
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_replaceable(out: Path, made_by: str, replaceable: Callable[[Path], bool]) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise CommandError(f"{out} is not a folder. Give a new or empty folder.")
    if any(out.iterdir()) and not replaceable(out):
        raise CommandError(f"{out} holds other files than those of {made_by}. Give a new or empty folder.")


def _made_by(out: Path, made_by: str) -> bool:
    try:
        return json.loads((out / RESULTS).read_text()).get("made_by") == made_by
    except (OSError, ValueError, AttributeError):
        return False


def _swap(fresh: Path, out: Path) -> None:
    fresh.chmod(0o755)  # mkdtemp's folders are private
    if not out.exists():
        fresh.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / out.name
    out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)

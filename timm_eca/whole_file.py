"""A file that appears whole or not at all."""

import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: processes that start at once see all of it or none.

    Raises:
        OSError: If it cannot be written; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}-", dir=path.parent, delete=False) as file:
        fresh = Path(file.name)
        try:
            file.write(content)
            file.flush()
            fresh.chmod(0o644)  # temporary files are private
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

"""`python -m timm_eca...` inside a checkout of timm must find the installed timm, not the checkout's `timm/` folder.

Python puts the working folder in front of `sys.path` for `-m`. Importing this module, before anything imports timm,
takes it off again if it is such a checkout and timm is installed elsewhere.
"""

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["leave_checkout"]


def leave_checkout() -> None:
    """Take the working folder off `sys.path` where `-m` put it there and it would shadow the installed timm."""
    # sys.argv is ['-m', ...] only while Python looks for the module that it was asked to run.
    if sys.argv[:1] != ["-m"] or "timm" in sys.modules or not _is_checkout(sys.path[0]):
        return
    working_folder = sys.path.pop(0)
    if importlib.util.find_spec("timm") is None:
        sys.path.insert(0, working_folder)


def _is_checkout(entry: str) -> bool:
    folder = Path(entry).absolute()
    return (
        folder == Path(os.getcwd()) and (folder / "timm" / "__init__.py").is_file() and (folder / "train.py").is_file()
    )


leave_checkout()

"""A package whose modules are timm's scripts, wherever they lie: `timm_eca.scripts.borrowed.train`.

A spawned process runs its parent's main module again, by name where it has one, by file otherwise. Given a name in
this package, it imports `timm_eca` on the way and registers its models. Run by file it would not. The script's folder
never enters `sys.path`, so a checkout's own `timm/` cannot shadow the installed one.
"""

import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

__all__ = ["FOLDER"]

FOLDER = "TIMM_ECA_BORROWED_SCRIPTS"
"""Environment variable with the scripts' folder; set by the launcher, inherited by the processes below it."""

__path__: list[str] = []  # makes this module a package


class _UncachedLoader(SourceFileLoader):
    """Compiles the file it is given: no bytecode beside it is read or written, only what was checked runs."""

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package != __name__ or not os.environ.get(FOLDER):
            return None
        file = Path(os.environ[FOLDER], f"{module}.py")
        return spec_from_file_location(name, file, loader=_UncachedLoader(name, str(file))) if file.is_file() else None


sys.meta_path.append(_Finder)

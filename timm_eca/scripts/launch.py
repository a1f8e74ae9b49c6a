"""Running a script of timm's in this interpreter, under `__main__`, where this package is registered."""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from ..errors import CommandError
from . import borrowed
from .source import Script, distance_warning, find_script

__all__ = ["COMMANDS", "run_script"]

COMMANDS = ("train", "validate", "benchmark", "inference", "onnx-export", "avg-checkpoints")
NEEDS = {"inference": ("pandas",), "onnx-export": ("onnx", "onnxscript")}
"""Packages that a script imports and timm does not bring."""

HELP = """usage: timm-eca {command} [--timm-scripts DIR] [arguments of timm's {name}.py]

Runs timm's {name}.py with the models and layers of timm_eca. All arguments but --timm-scripts are the script's own, and
so is their list, which needs the script: a checkout of timm's repository in DIR or $TIMM_SCRIPTS, or a download."""


def run_script(command: str, arguments: Sequence[str]) -> None:
    """Run a script of timm's as if it had been started as a file, but with this package's names registered.

    The script sees its own arguments in `sys.argv` and is `__main__`; what it raises, `SystemExit` included, leaves
    as it is. Processes that it forks inherit the registration, those it spawns make it again.

    Args:
        command: One of `COMMANDS`.
        arguments: The script's arguments; `--timm-scripts DIR` among them names a folder that holds the script.

    Raises:
        CommandError: If the script cannot be had, or a package that it imports is missing.
    """
    folder, passed = _split(arguments)
    name = command.replace("-", "_")
    try:
        script = find_script(name, folder)
    except CommandError:
        if {"-h", "--help"} & set(passed):
            print(HELP.format(command=command, name=name))
        raise
    _check_packages(command)
    if (warning := distance_warning(script, timm.__version__)) and os.environ.get("RANK", "0") == "0":
        print(f"timm-eca: warning: {warning}", file=sys.stderr)
    _run(script, passed)


def _check_packages(command: str) -> None:
    missing = [name for name in NEEDS.get(command, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"timm's {command} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take `--timm-scripts DIR` out of the arguments; those after a bare `--` are left alone."""
    folder = None
    passed: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            passed += [argument, *rest]
        elif argument == "--timm-scripts" or argument.startswith("--timm-scripts="):
            name = argument.partition("=")[2] if "=" in argument else next(rest, "")
            if not name:
                raise CommandError("--timm-scripts needs a folder: a checkout of timm's repository.")
            folder = Path(name)
        else:
            passed.append(argument)
    return folder, passed


def _run(script: Script, arguments: list[str]) -> None:
    argv = sys.argv
    sys.argv = [str(script.path), *arguments]
    os.environ[borrowed.FOLDER] = str(script.path.parent)  # processes that the script spawns look there too
    try:
        runpy.run_module(f"{borrowed.__name__}.{script.path.stem}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv

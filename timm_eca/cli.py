"""The console command `timm-eca`: parses and calls."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import CommandError
from .scripts import COMMANDS, run_script

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-eca", description="Efficient Channel Attention for timm.")
    parser.add_argument("--version", action="version", version=f"timm-eca {version('timm-eca')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train resnet18 with and without ECA on scanned digits, offline")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=10, help="epochs for each model (default: %(default)s)")
    demo.set_defaults(run=_demo)
    for command in COMMANDS:
        script = commands.add_parser(
            command, help=f"timm's {command.replace('-', '_')}.py; --timm-scripts DIR: a checkout"
        )
        script.set_defaults(run=_script)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(args.out, args.epochs)


def _script(args: argparse.Namespace) -> None:
    run_script(args.command, args.arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for anything the user can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # timm's scripts parse their own arguments, --help among them: argparse sees the command alone.
    is_script = bool(argv) and argv[0] in COMMANDS
    args = _parser().parse_args(argv[:1] if is_script else argv, argparse.Namespace(arguments=argv[1:]))
    try:
        args.run(args)
    except CommandError as error:
        print(f"timm-eca: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_script:
            raise
        print("timm-eca: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

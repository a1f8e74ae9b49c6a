"""The console command `timm-eca`: parses and calls."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import CommandError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-eca", description="Efficient Channel Attention for timm.")
    parser.add_argument("--version", action="version", version=f"timm-eca {version('timm-eca')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train resnet18 with and without ECA on scanned digits, offline")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=10, help="epochs for each model (default: %(default)s)")
    demo.set_defaults(run=_demo)
    complexity = commands.add_parser("complexity", help="count the paper's models again, beside its tables")
    complexity.add_argument(
        "sections", nargs="*", help="table_2, table_3, table_a, table_5, table_6, headline, grid (default: all)"
    )
    complexity.add_argument("--format", default="markdown", help="markdown, csv or json (default: %(default)s)")
    complexity.add_argument("--out", type=Path, help="file to write (default: standard output)")
    complexity.set_defaults(run=_complexity)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(args.out, args.epochs)


def _complexity(args: argparse.Namespace) -> None:
    from .complexity import run_complexity

    run_complexity(args.sections, args.format, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for anything the user can mend, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except CommandError as error:
        print(f"timm-eca: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("timm-eca: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

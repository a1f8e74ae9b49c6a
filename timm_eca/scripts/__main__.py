"""`python -m timm_eca.scripts train ...`, and below `torchrun -m`: what `timm-eca train ...` does."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import CommandError
from .launch import COMMANDS, run_script

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script of timm's and return 0; its own exit code and signals leave as they come."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m timm_eca.scripts", description="timm's scripts with timm_eca.")
    parser.add_argument("command", choices=COMMANDS, help="timm's script; all that follows are its arguments")
    args = parser.parse_args(argv[:1])
    try:
        run_script(args.command, argv[1:])
    except CommandError as error:
        print(f"timm-eca: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The console command `timm-eca`: parses and calls."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import CommandError, WeightsError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-eca", description="Efficient Channel Attention for timm.")
    parser.add_argument("--version", action="version", version=f"timm-eca {version('timm-eca')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train resnet18 with and without ECA on scanned digits, offline")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=10, help="epochs for each model (default: %(default)s)")
    demo.set_defaults(run=_demo)
    _add_convert(commands)
    _add_hub(commands)
    return parser


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="turn an official or timm training checkpoint into Hub format")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file of torch.save or safetensors")
    convert.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write, new or empty")
    convert.add_argument("--model", metavar="NAME", help="what the file must hold (default: inferred from it)")
    convert.add_argument("--ema", action="store_true", help="take the moving average of a training checkpoint")
    convert.set_defaults(run=_convert)


def _add_hub(commands) -> None:
    push = commands.add_parser("push", help="upload a folder in Hub format")
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("repo", metavar="org/name", help="repository, made if it does not exist")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="branch to commit to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(run=_push)
    verify = commands.add_parser("verify", help="check weights against their recorded sha256 and their config")
    verify.add_argument("source", metavar="DIR|org/name[@REV]")
    verify.set_defaults(run=_verify)


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(args.out, args.epochs)


@contextlib.contextmanager
def _mendable() -> Iterator[None]:
    """Turn the errors of files and weights into the command line's one."""
    try:
        yield
    except (ValueError, WeightsError) as error:
        raise CommandError(str(error)) from error


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert

    with _mendable():
        found = convert(args.checkpoint, args.out, args.model, ema=args.ema)
    sizes = ", ".join(map(str, found.kernel_sizes))
    print(f"{found.model}, kernel size per stage {sizes}, {found.num_classes} classes: saved to {args.out}")


def _push(args: argparse.Namespace) -> None:
    from . import hub

    with _mendable():
        url = hub.push(args.folder, args.repo, private=args.private, revision=args.revision, create_pr=args.create_pr)
    print(url)


def _verify(args: argparse.Namespace) -> None:
    from . import hub

    with _mendable():
        found = hub.verify(args.source)
    print(f"{args.source}: intact. {found['architecture']}, {found['tensors']} tensors, sha256 {found['sha256']}")


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

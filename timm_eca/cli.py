"""The console command `timm-eca`: parses and calls."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import CommandError, WeightsError
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
    plan = commands.add_parser("plan", help="show where attention goes in a model")
    plan.add_argument("name", help="name of a timm model")
    plan.add_argument("--attn", default="eca", help="name of the layer (default: %(default)s; eca_* models: their own)")
    plan.add_argument("--where", default="auto", help="auto, end, add or stage (default: %(default)s; likewise)")
    plan.set_defaults(run=_plan)
    coverage = commands.add_parser("coverage", help="build every timm model with ECA and tabulate where it sits")
    coverage.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    coverage.add_argument(
        "--out", type=Path, help="folder for coverage.md and coverage.json (default: the table on standard output)"
    )
    coverage.add_argument("--filter", default="", help="only names that match, such as 'resnet*'")
    coverage.set_defaults(run=_coverage)
    for command in COMMANDS:
        script = commands.add_parser(
            command, help=f"timm's {command.replace('-', '_')}.py; --timm-scripts DIR: a checkout"
        )
        script.set_defaults(run=_script)
    complexity = commands.add_parser("complexity", help="count the paper's models again, beside its tables")
    complexity.add_argument(
        "sections", nargs="*", help="table_2, table_3, table_a, table_5, table_6, headline, grid (default: all)"
    )
    complexity.add_argument("--format", default="markdown", help="markdown, csv or json (default: %(default)s)")
    complexity.add_argument("--out", type=Path, help="file to write (default: standard output)")
    complexity.set_defaults(run=_complexity)
    _add_convert(commands)
    _add_hub(commands)
    return parser


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="turn an official or timm training checkpoint of an eca_* model into Hub format",
        description="Turn a checkpoint of the paper's authors or of timm's train.py, or a state dict, of one of the"
        " eca_* models, into a folder in Hub format. The model and its kernel sizes are inferred from the weights; no"
        " code of a pickle is run.",
    )
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file of torch.save or safetensors")
    convert.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write, new or empty")
    convert.add_argument(
        "--model",
        metavar="NAME",
        help="what the file must hold (default: inferred from it);"
        " with a tag, eca_resnet50.ecanet_in1k, it is the authors' file, and the card gives their figures",
    )
    convert.add_argument("--ema", action="store_true", help="take the moving average of a training checkpoint")
    convert.set_defaults(run=_convert)


def _add_hub(commands) -> None:
    push = commands.add_parser(
        "push",
        help="upload a folder in Hub format",
        description="Check a folder in Hub format and upload it as one commit. Log in with hf auth login, or set"
        " HF_TOKEN to a token that may write.",
    )
    push.add_argument("folder", type=Path, metavar="DIR", help="folder that timm-eca convert or hub.save wrote")
    push.add_argument("repo", metavar="org/name", help="repository, made if it does not exist")
    push.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    push.add_argument("--revision", help="branch to commit to, made if it does not exist (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.set_defaults(run=_push)
    verify = commands.add_parser(
        "verify",
        help="check weights against their recorded sha256 and their config",
        description="Compare weights with the sha256 in their config.json, and their tensors with the model it names.",
    )
    verify.add_argument("source", metavar="DIR|org/name[@REV]", help="folder, or repository to download and check")
    verify.set_defaults(run=_verify)


@contextlib.contextmanager
def _mendable(*further: type[Exception]) -> Iterator[None]:
    """Turn the errors of values, files and weights, and further ones, into the command line's one, of one line."""
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, WeightsError, *further)
    try:
        yield
    except mendable as error:
        raise CommandError(" ".join(str(error).split())) from error


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(args.out, args.epochs)


def _plan(args: argparse.Namespace) -> None:
    from .plan import plan_table

    with _mendable(RuntimeError):  # timm's for an unknown model
        table = plan_table(args.name, args.attn, args.where)
    print(table)


def _coverage(args: argparse.Namespace) -> None:
    import fnmatch

    from tqdm import tqdm

    from .coverage import DATA, TABLE, check_place, markdown, survey, timm_names, write_tables

    names = fnmatch.filter(timm_names(), args.filter or "*")
    if not names or args.jobs < 1:
        raise CommandError(f"--filter {args.filter!r} must match a model and --jobs be at least 1, got {args.jobs}.")
    if args.out:
        check_place(args.out, args.filter)  # before the minutes that follow
    rows = list(tqdm(survey(names, args.jobs), total=len(names), unit="model"))
    if not args.out:
        print(markdown(rows), end="")
        return
    try:
        write_tables(rows, args.out, args.filter)
    except OSError as error:
        raise CommandError(f"cannot write to {args.out}: {error.strerror or error}.") from error
    taking = sum(row.sites > 0 for row in rows)
    print(f"{taking} of {len(rows)} models take the layer: {args.out / TABLE}, {args.out / DATA}")


def _script(args: argparse.Namespace) -> None:
    run_script(args.command, args.arguments)


def _complexity(args: argparse.Namespace) -> None:
    from .complexity import run_complexity

    run_complexity(args.sections, args.format, args.out)


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
    """Run the command line and return its exit code.

    0; 2 for anything the user can mend; 130 when interrupted; 141 when the reader of the output went away, as `head`
    does.
    """
    argv = sys.argv[1:] if argv is None else argv
    # timm's scripts parse their own arguments, --help among them: argparse sees the command alone.
    is_script = bool(argv) and argv[0] in COMMANDS
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the console cannot show breaks nothing
    args = _parser().parse_args(argv[:1] if is_script else argv, argparse.Namespace(arguments=argv[1:]))
    try:
        args.run(args)
        if not is_script:
            print(end="", flush=True)  # here and not at Python's end, where an error could not be caught
    except BrokenPipeError:
        if is_script:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 141
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

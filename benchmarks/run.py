"""Accuracy and speed of backbones x attention layers, by timm's own validate.py and benchmark.py.

Each backbone runs with each attention layer, one process a step, as timm's bulk runner does; what a step told is kept
before the next begins, so the same command goes on after a crash. Writes, with the columns of timm's results/ folder,
results.csv (validation), benchmark-infer.csv and benchmark-train.csv, and a table in Markdown, table.md.

By default the data are scikit-learn's scanned digits at 32 x 32, on which each model is trained first, by train.py.
For ImageNet: --data /path/to/imagenet, and --pretrained or --checkpoints for the weights.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import write_tables

PLAIN = "none"
DIGITS = shlex.split("--num-classes 10 --input-size 3 32 32 --crop-pct 1 --interpolation bilinear")
DIGITS_TRAIN = shlex.split(
    "--opt momentum --lr 0.02 --sched cosine --warmup-epochs 0 --batch-size 64"
    " --hflip 0 --scale 0.8 1 --ratio 0.9 1.1 --color-jitter 0"
)


class Ledger:
    """The results of steps already done, a line of JSON each, and the settings they were made with."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = self._read()
        if entries and entries[0] != settings:
            sys.exit(f"{path} was made with other settings: {entries[0]}. Give another folder with --out.")
        # Written anew: what a crash cut off goes, and so do failures, which are tried again.
        kept = [entry for entry in entries[1:] if "error" not in entry["result"]]
        self.done: dict[tuple[str, str], dict[str, Any]] = {(e["row"], e["step"]): e["result"] for e in kept}
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in [settings, *kept]))
        fresh.replace(path)

    def _read(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def add(self, row: str, step: str, result: dict[str, Any]) -> None:
        self.done[row, step] = result
        with open(self.path, "a") as file:
            file.write(json.dumps({"row": row, "step": step, "result": result}) + "\n")


def run_step(command: str, arguments: list[str], log: Path) -> dict[str, Any]:
    """Run one of timm's scripts and return what it printed after `--result`, or its error; the log is kept."""
    process = subprocess.run(
        [sys.executable, "-m", "timm_eca.scripts", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(process.stdout)
    _, told, result = process.stdout.rpartition("--result\n")
    lines = process.stdout.strip().splitlines() or ["no output"]
    if process.returncode == 2 and lines[-1].startswith("timm-eca: "):
        sys.exit(lines[-1])  # no script to run: true of every step
    if process.returncode != 0 or not told:
        return {"error": f"exit code {process.returncode}: {lines[-1]}"}
    parsed = json.loads(result)
    return parsed if isinstance(parsed, dict) else {"epochs": parsed}


class Grid:
    """The steps of every row: how each script is called for a backbone with an attention layer."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.digits = args, args.data is None
        self.data = args.out / "digits" if self.digits else args.data
        self.ledger = Ledger(args.out / "runs.jsonl", settings(args))

    def run(self) -> None:
        if self.digits and not self.data.exists():
            make_digits(self.data)
        for backbone in self.args.models:
            for attn in self.args.attn:
                self._run_row(backbone, attn)
                write_tables(self.args.out, self.ledger.done)

    def _run_row(self, backbone: str, attn: str) -> None:
        row = backbone if attn == PLAIN else f"{backbone}+{attn}"
        model = ["--model", backbone, "--device", self.args.device]
        model += [] if attn == PLAIN else ["--model-kwargs", f"attn_layer={attn}"]
        for step, arguments in self._steps(row):
            if (row, step) in self.ledger.done:
                continue
            print(f"{row}: {step}", flush=True)
            result = run_step(step, [*model, *arguments], self.args.out / "logs" / f"{row}-{step}.txt")
            self.ledger.add(row, step, result)
            if "error" in result:
                print(f"{row}: {step} failed, {result['error']}", flush=True)
                return

    def _steps(self, row: str) -> list[tuple[str, list[str]]]:
        args = self.args
        data = ["--data-dir", str(self.data), *(DIGITS if self.digits else [])]
        split = ["--split", "val"] if self.digits else []
        trained = args.out / "train" / row
        steps = []
        if args.epochs:
            out = ["--output", str(trained.parent), "--experiment", row, "--epochs", str(args.epochs)]
            out += ["--resume", str(trained / "last.pth.tar")] if (trained / "last.pth.tar").is_file() else []
            recipe = [*DIGITS_TRAIN, "--val-split", "val"] if self.digits else []
            steps.append(("train", [*data, *recipe, *out, *args.train_args]))
        weights = ["--pretrained"] if args.pretrained else ["--checkpoint", str(self._checkpoint(row, trained))]
        steps.append(("validate", [*data, *split, *weights, *args.validate_args]))
        size = ["--img-size", "32"] if self.digits else []
        steps.append(("benchmark", ["--bench", "both", *size, *args.benchmark_args]))
        return steps

    def _checkpoint(self, row: str, trained: Path) -> Path:
        return trained / "last.pth.tar" if self.args.epochs else self.args.checkpoints / f"{row}.safetensors"


def make_digits(folder: Path) -> None:
    """Write the digits, whole or not at all."""
    from timm_eca.demo.digits import write_digits

    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        write_digits(Path(fresh, folder.name), seed=42)
        Path(fresh, folder.name).rename(folder)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what rows must have in common to stand in one table: all but the list of rows."""
    rows = ("models", "attn", "out", "model_list")
    return {key: str(value) for key, value in sorted(vars(args).items()) if key not in rows}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100"], help="backbones' names")
    parser.add_argument("--model-list", type=Path, metavar="FILE", help="file of names, one a line, as timm takes it")
    parser.add_argument("--attn", nargs="+", default=[PLAIN, "eca"], help="attention layers' names; none: without")
    parser.add_argument("--data", type=Path, metavar="DIR", help="image folder, such as ImageNet's (default: digits)")
    parser.add_argument("--pretrained", action="store_true", help="validate timm's or this package's own weights")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="validate DIR/BACKBONE+ATTN.safetensors")
    parser.add_argument("--epochs", type=int, help="train this long first (default: 5 on digits, else 0)")
    parser.add_argument("--device", help="as timm's scripts take it (default: cuda where there is one, else cpu)")
    for step in ("train", "validate", "benchmark"):
        parser.add_argument(f"--{step}-args", type=shlex.split, default=[], metavar="'...'", help=f"more for {step}.py")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder to write (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model_list:
        if not args.model_list.is_file():
            parser.error(f"--model-list {args.model_list} is not a file")
        args.models = args.model_list.read_text().split()
    given = bool(args.pretrained) + (args.checkpoints is not None)
    if args.epochs is None:
        args.epochs = 5 if args.data is None and not given else 0
    if given + (args.epochs > 0) != 1:
        parser.error("weights must come from one of --pretrained, --checkpoints DIR and --epochs N")
    args.device = args.device or default_device()
    args.out = args.out.absolute()
    return args


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    Grid(parse()).run()

"""timm's own scripts over one model's life on scanned digits: train, validate, resume, average, convert, export.

Two models, an entrypoint of this package and timm's backbone with `attn_layer=eca`, go through every step by
`python -m timm_eca.scripts`. Figures that two steps tell must agree, or the run fails. Writes one JSON file with the
commands, the ends of their logs, the figures and the versions.
"""

import argparse
import csv
import datetime
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import timm_eca  # noqa: F401
from timm_eca.demo.digits import write_digits

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
MODELS = {
    "eca_resnet18": ["--model", "eca_resnet18"],
    "resnet18+eca": ["--model", "resnet18", "--model-kwargs", "attn_layer=eca"],
}
DATA = shlex.split("--data-dir digits --input-size 3 32 32 --crop-pct 1 --num-classes 10 --workers 2 --device cpu")
RECIPE = shlex.split("--opt momentum --lr 0.02 --sched step --decay-epochs 3 --warmup-epochs 0 --batch-size 64")
AUGMENTATION = shlex.split("--hflip 0 --scale 0.8 1 --ratio 0.9 1.1 --color-jitter 0")
TRAIN = [*DATA, *RECIPE, *AUGMENTATION, "--val-split", "val"]
VALIDATE = [*DATA, "--split", "val", "--batch-size", "128"]
LOG_LINES = 12


class Story:
    """The steps of one model in a folder, each a script of timm's; what they say is kept."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.out = folder, name, folder / name
        self.steps: list[dict[str, Any]] = []

    def script(self, command: str, *arguments: object) -> str:
        """Run a script and return what it printed; its failure is the story's."""
        line = [command, *map(str, arguments)]
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", "timm_eca.scripts", *line],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode != 0:
            raise SystemExit(f"{shlex.join(line)}: exit code {process.returncode}\n{process.stdout[-4000:]}")
        log = [entry for entry in process.stdout.splitlines() if entry.strip()]
        seconds = round(time.perf_counter() - started, 1)
        self.steps.append({"command": shlex.join(line), "seconds": seconds, "log": log[-LOG_LINES:]})
        return process.stdout

    def summary(self) -> list[dict[str, float]]:
        """Return the rows of train.py's summary.csv, one per epoch; a resumed run adds its own."""
        with open(self.out / "summary.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["epoch"] != "epoch"]
        return [{key: float(value) for key, value in row.items()} for row in rows]

    def top1(self, *arguments: object) -> float:
        """Return validate.py's top-1 in percent."""
        printed = self.script("validate", *VALIDATE, *arguments)
        return float(json.loads(printed.partition("--result\n")[2])["top1"])

    def figures(self, epochs: int) -> dict[str, Any]:
        """Live the whole story and return its figures."""
        model = MODELS[self.name]
        out = ["--output", ".", "--experiment", self.name]
        self.script("train", *TRAIN, *model, *out, "--epochs", epochs)
        trained = self.summary()
        validated = self.top1(*model, "--checkpoint", self.out / "last.pth.tar")
        agree("train.py's last line and validate.py", trained[-1]["eval_top1"], validated)
        self.script("train", *TRAIN, *model, *out, "--epochs", epochs + 1, "--resume", self.out / "last.pth.tar")
        epochs_seen = [int(row["epoch"]) for row in self.summary()]
        agree("epochs before and after --resume", epochs_seen, list(range(epochs + 1)))
        averaged = self.average()
        top1 = self.top1(*model, "--checkpoint", averaged)
        hub = self.convert(averaged)
        from_hub = self.top1("--model", f"local-dir:{hub}", "--pretrained")
        agree("the averaged weights and their Hub folder", top1, from_hub)
        inferred = self.inferred(hub)
        if inferred is not None:
            agree("validate.py and inference.py", from_hub, inferred)
        speed = self.speed()
        exported = self.export(hub)
        return {
            "epochs": self.summary(),
            "top-1 (%)": {"validated": validated, "averaged": top1, "from local-dir:": from_hub, "inferred": inferred},
            "images per second": speed,
            "ONNX": exported,
        }

    def average(self) -> Path:
        """Average the checkpoints, check the averages against a plain mean, and return the file."""
        path = self.out / "averaged.safetensors"
        files = sorted(self.out.glob("checkpoint-*.pth.tar"))
        options = ["--input", self.out, "--filter", "checkpoint-*.pth.tar", "--no-sort", "--safetensors"]
        self.script("avg-checkpoints", *options, "--output", path)
        states = [torch.load(file, weights_only=False)["state_dict"] for file in files]
        for key, value in load_file(path).items():
            mean = torch.stack([state[key].double() for state in states]).mean(0)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6, msg=f"{key} is not the mean")
        return path

    def convert(self, weights: Path) -> Path:
        """Write the model in Hub format and return the folder."""
        folder = self.out / "hub"
        options = {"attn_layer": "eca"} if "+" in self.name else {}
        name = self.name.partition("+")[0]
        model = timm.create_model(name, num_classes=10, checkpoint_path=str(weights), **options)
        save_for_hf(model, str(folder), model_config={"label_names": list("0123456789")}, safe_serialization=True)
        return folder

    def inferred(self, hub: Path) -> float | None:
        """Return the share, in percent, of images that inference.py names rightly; None without its package."""
        if importlib.util.find_spec("pandas") is None:
            return None
        options = [*DATA, "--split", "val", "--model", f"local-dir:{hub}", "--pretrained"]
        written = ["--results-dir", self.out, "--results-file", "inferred", "--include-index", "--topk", "1"]
        self.script("inference", *options, *written, "--no-console-results")
        truth = {path.name: path.parent.name for path in (self.folder / "digits" / "val").glob("*/*.png")}
        with open(self.out / "inferred.csv") as file:
            rows = list(csv.DictReader(file))
        right = sum(row["index"].strip("[]") == truth[Path(row["filename"]).name] for row in rows)
        return 100 * right / len(truth)

    def speed(self) -> dict[str, float]:
        """Return benchmark.py's images per second at 32 x 32, inference and training."""
        sizes = ["--img-size", "32", "--batch-size", "32", "--num-warm-iter", "2", "--num-bench-iter", "10"]
        printed = self.script("benchmark", *MODELS[self.name], *sizes, "--device", "cpu", "--bench", "both")
        result = json.loads(printed.partition("--result\n")[2])
        return {kind: result[f"{kind}_samples_per_sec"] for kind in ("infer", "train")}

    def export(self, hub: Path) -> str:
        """Export to ONNX where its package is installed; onnx_export.py checks the file it wrote."""
        if importlib.util.find_spec("onnxscript") is None:
            return "not run: the packages onnx and onnxscript are not installed"
        path = self.out / "model.onnx"
        self.script("onnx-export", path, "--model", f"local-dir:{hub}", "--img-size", "32")
        return f"{path.stat().st_size} bytes"


def agree(what: str, first: Any, second: Any) -> None:
    """Stop the run unless two figures are the same, to the four decimals that timm writes."""
    close = abs(first - second) < 1e-3 if isinstance(first, float) else first == second
    if not close:
        raise SystemExit(f"{what} do not agree: {first} and {second}")


def environment() -> dict[str, Any]:
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    scripts = Path(os.environ.get("TIMM_SCRIPTS") or "", "timm", "version.py")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "timm": timm.__version__,
        "timm's scripts": scripts.read_text().split("'")[1] if scripts.is_file() else "downloaded",
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cores}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="epochs before the resumed one (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder, "digits"), seed=42)
        for name in MODELS:
            story = Story(Path(folder), name)
            figures = story.figures(args.epochs)
            results["models"][name] = {"figures": figures, "steps": story.steps}
            print(name, json.dumps(figures["top-1 (%)"]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1).replace(folder, ".") + "\n")
    print(f"Saved to {args.out}")


if __name__ == "__main__":
    main()

"""Figure 4's layout: ECA with fixed kernel sizes against the adaptive one, with SE and no attention beside.

Trains every model with every kernel size and seed on an image folder with train/ and val/ (default: scikit-learn's
scanned digits, written on the spot), keeps each finished run in results.json and draws kernel_sweep.png. A sweep that
was interrupted continues where it stopped.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import random_seed

from timm_eca import add_attn_
from timm_eca.demo.digits import write_digits
from timm_eca.demo.training import AUGMENTATION, BATCH_SIZE, DATA_CONFIG, make_loaders, train
from timm_eca.errors import CommandError

MADE_BY = "benchmarks/kernel_sweep.py"
DIGITS_SPLIT_SEED = 42
BASELINES = ("none", "SE")
LINES = {"adaptive": ("ECA, adaptive k", "tab:red"), "SE": ("SE", "tab:green"), "none": ("none", "tab:gray")}
NEEDS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        sweep(parse(argv))
    except CommandError as error:
        print(f"kernel_sweep: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="image folder with train/ and val/ (default: digits)")
    parser.add_argument("--size", type=int, default=224, help="input size for --data (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["resnet18"], help="timm's ResNets (default: resnet18)")
    parser.add_argument("--kernels", nargs="+", type=int, default=[3, 5, 7, 9], help="fixed sizes (default: 3 5 7 9)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds for each point (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each run (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("kernel-sweep"), help="folder to write (default: %(default)s)")
    return parser.parse_args(argv)


def sweep(args: argparse.Namespace) -> None:
    check(args)
    results = load(args)
    loaders = load_data(args)
    classes = len(loaders[0].dataset.reader.class_to_idx)
    configs = (*BASELINES, *map(str, sorted(set(args.kernels))), "adaptive")
    wanted = {(model, config): range(args.seeds) for model in args.models for config in configs}
    for (model, config), seeds in wanted.items():
        for seed in seeds:
            name = f"{model} {config} {seed}"
            if name not in results["runs"]:
                results["runs"][name] = train_one(model, config, seed, args, loaders, classes)
                save(args.out, results)
    tops = {key: [results["runs"][f"{' '.join(key)} {s}"]["top1"][-1] for s in seeds] for key, seeds in wanted.items()}
    plot(tops, caption(results["settings"], args.seeds), args.out / "kernel_sweep.png")
    for (model, config), values in tops.items():
        print(f"{model} {config}: {statistics.mean(values):.2f} % +- {spread(values):.2f}, {len(values)} seeds")


def check(args: argparse.Namespace) -> None:
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"the sweep needs {', '.join(missing)}: pip install {' '.join(missing)}")
    for name in ("seeds", "epochs", "size"):
        if getattr(args, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    even = [k for k in args.kernels if k < 1 or k % 2 == 0]
    if even:
        raise CommandError(f"--kernels must be odd and positive, got {', '.join(map(str, even))}.")
    unknown = [m for m in args.models if m not in timm.list_models("resne*", module="resnet")]
    if unknown:
        raise CommandError(f"--models must be ResNets of timm, got {', '.join(unknown)}.")
    for split in ("train", "val") if args.data else ():
        if not (args.data / split).is_dir():
            raise CommandError(f"--data must be a folder with train/ and val/, {args.data} has no {split}/.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {args.out}: {error.strerror}. Give another folder with --out.") from None


def load_data(args: argparse.Namespace) -> Any:
    data = args.data or digits(args.out)
    try:
        loaders = make_loaders(data, *data_settings(args), workers=args.workers)
    except RuntimeError as error:  # timm found no images
        raise CommandError(f"{data}: {error}") from None
    if not len(loaders[0]):
        raise CommandError(
            f"{data} has {len(loaders[0].dataset)} training images, less than one batch of {BATCH_SIZE}."
        )
    return loaders


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what runs must share to stand in one figure."""
    data = {"data": str(args.data.resolve()), "size": args.size} if args.data else {"data": "digits", "size": 32}
    return data | {"epochs": args.epochs}


def load(args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / "results.json"
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    fresh = {"made_by": MADE_BY, "settings": settings(args), "versions": versions, "runs": {}}
    if not path.exists():
        return fresh
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = {}
    if found.get("made_by") != MADE_BY or found.get("settings") != fresh["settings"]:
        raise CommandError(
            f"{path} is not of a sweep with settings {fresh['settings']}. Give another folder with --out."
        )
    return found


def save(out: Path, results: dict[str, Any]) -> None:
    fresh = out / ".results.json"
    fresh.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(fresh, out / "results.json")


def digits(out: Path) -> Path:
    root = out / "digits"
    if not root.exists():
        partial = out / ".digits"
        write_digits(partial, DIGITS_SPLIT_SEED)
        partial.rename(root)
    return root


def data_settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return data config and augmentation: the demo's for digits, timm's defaults for ImageNet otherwise."""
    if args.data is None:
        return DATA_CONFIG, AUGMENTATION
    return {"input_size": (3, args.size, args.size), "interpolation": "bilinear", "crop_pct": 0.875}, {}


def train_one(model: str, config: str, seed: int, args: argparse.Namespace, loaders: Any, classes: int) -> dict:
    random_seed(seed)
    channels = 1 if args.data is None else 3
    network = timm.create_model(model, num_classes=classes, in_chans=channels)
    if config == "SE":
        add_attn_(network, "se_paper")
    elif config != "none":
        add_attn_(network, "eca", attn_kwargs={"kernel_size": None if config == "adaptive" else int(config)})
    history = train(network.to(args.device), loaders, args.epochs, seed, f"{model} {config} seed {seed}")
    return {"top1": history.top1, "val_loss": history.val_loss, "seconds": round(history.seconds, 1)}


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(tops: dict[tuple[str, str], list[float]], text: str, path: Path) -> None:
    """Draw one panel for each model: fixed kernel sizes as points, the others as lines, spreads as bars and bands."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(model for model, _ in tops))
    figure = Figure(figsize=(5.5 * len(models), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False).flat, models):
        mine = {config: values for (owner, config), values in tops.items() if owner == model}
        fixed = [config for config in mine if config.isdigit()]
        means, spreads = ([f(mine[k]) for k in fixed] for f in (statistics.mean, spread))
        axes.errorbar([*map(int, fixed)], means, spreads, marker="o", capsize=3, label="ECA, fixed k")
        for config, (label, color) in LINES.items():
            mean, width = statistics.mean(mine[config]), spread(mine[config])
            axes.axhline(mean, color=color, linestyle="--", label=label)
            axes.axhspan(mean - width, mean + width, color=color, alpha=0.1)
        axes.set(title=model, xlabel="kernel size k", ylabel="validation top-1 (%)", xticks=[*map(int, fixed)])
        axes.legend(fontsize=8)
    figure.suptitle(text, fontsize=8)
    figure.savefig(path, dpi=150)


def caption(used: dict[str, Any], seeds: int) -> str:
    data = "scikit-learn digits" if used["data"] == "digits" else used["data"]
    return (
        f"All trained here: {data} at {used['size']} x {used['size']}, {used['epochs']} epochs, {seeds} seeds, mean and"
        " standard deviation.\nThe layout of the paper's Figure 4, none of its numbers, which are ImageNet's."
    )


if __name__ == "__main__":
    sys.exit(main())

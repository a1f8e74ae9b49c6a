"""The demo's story: data, two models, a table, a saved model that comes back identical, two pictures."""

import datetime
import importlib.util
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import random_seed
from torch import nn

from .. import hub
from ..errors import CommandError
from ..inject import attn_modules
from ..outputs import RESULTS, whole_folder
from ..weights import CARD, CONFIG, WEIGHTS
from .digits import CLASSES, write_digits
from .figures import mean_channel_weights, plot_channel_weights, plot_curves
from .training import DATA_CONFIG, History, make_loaders, train

__all__ = ["run_demo"]

MADE_BY = "timm-eca demo"
FILES = (
    f"digits/train/[0-9]/{'[0-9]' * 4}.png",
    f"digits/val/[0-9]/{'[0-9]' * 4}.png",
    f"model/{CONFIG}",
    f"model/{WEIGHTS}",
    f"model/{CARD}",
    "curves.png",
    "channel_weights.png",
    RESULTS,
)
BACKBONE = "resnet18"
NEEDS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}
SEED = 42


def run_demo(out: Path, epochs: int) -> None:
    """Train `resnet18` bare and with ECA on digits, and leave data, model, figures and results in a folder.

    Args:
        out: Folder to write, new, empty, or as an earlier demo left it.
        epochs: Number of epochs for each of the two models, at least 1.

    Raises:
        CommandError: If a package is missing, epochs is below 1 or the folder cannot be written.
    """
    _check(epochs)
    with whole_folder(out, MADE_BY, FILES) as folder:
        counts = write_digits(folder / "digits", SEED)
        times = f"{epochs} {'epoch' if epochs == 1 else 'epochs'} each"
        print(f"{counts[0]} training and {counts[1]} validation images, {times}, {BACKBONE} at 32 x 32")
        loaders = make_loaders(folder / "digits")
        models: dict[str, nn.Module] = {}
        histories: dict[str, History] = {}
        for label, attn_layer in ((BACKBONE, None), (f"{BACKBONE} + eca", "eca")):
            random_seed(SEED)
            models[label] = timm.create_model(BACKBONE, num_classes=len(CLASSES), in_chans=1, attn_layer=attn_layer)
            histories[label] = train(models[label], loaders, epochs, SEED, label)
        rows = [_row(label, models[label], histories[label]) for label in models]
        _print_table(rows)
        _save_and_reload(models[label], loaders[1], folder / "model")
        plot_curves(histories, folder / "curves.png")
        weights = mean_channel_weights(models[label], loaders[1], len(CLASSES))
        plot_channel_weights(weights, CLASSES, folder / "channel_weights.png")
        _write_results(folder / RESULTS, rows, histories)
    print(f"Saved to {out}: digits/, model/ (Hub format), curves.png, channel_weights.png, {RESULTS}")


def _check(epochs: int) -> None:
    if epochs < 1:
        raise CommandError(f"--epochs must be at least 1, got {epochs}.")
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandError(f"the demo needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _row(label: str, model: nn.Module, history: History) -> dict[str, Any]:
    return {
        "model": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention parameters": sum(p.numel() for m in attn_modules(model).values() for p in m.parameters()),
        "seconds": round(history.seconds, 1),
        "top-1 (%)": round(history.top1[-1], 2),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [list(rows[0])] + [[f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


@torch.inference_mode()
def _save_and_reload(model: nn.Module, loader: Any, folder: Path) -> None:
    """Save a model in Hub format, load it both ways by its folder, and require the same logits to the last bit."""
    config = {"label_names": CLASSES, "pretrained_cfg": {"tag": "digits", "paper_ids": "arXiv:1910.03151"}}
    origin = f"trained by `{MADE_BY}` on scikit-learn's scanned digits"
    # Not portable: the layer that timm has of its own rounds differently.
    hub.save(model, folder, portable=False, origin=origin, model_config=config, data_config=DATA_CONFIG)
    reloaded = {
        "timm_eca.hub.load('...')": hub.load(folder),
        "timm.create_model('local-dir:...', pretrained=True)": timm.create_model(
            f"local-dir:{folder}", pretrained=True
        ),
    }
    model.eval()
    for way, again in reloaded.items():
        again.eval()
        if not all(torch.equal(model(images), again(images)) for images, _ in loader):
            raise RuntimeError(f"the logits of {way} differ from the saved model's")
        print(f"Reloaded with {way}: logits identical on {len(loader.dataset)} images")


def _write_results(path: Path, rows: list[dict[str, Any]], histories: dict[str, History]) -> None:
    results = {
        "made_by": MADE_BY,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "timm": timm.__version__, "torch": torch.__version__},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "seed": SEED,
        "rows": rows,
        "histories": {label: asdict(history) for label, history in histories.items()},
    }
    path.write_text(json.dumps(results, indent=2) + "\n")

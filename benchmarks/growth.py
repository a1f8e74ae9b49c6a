"""How the cost of ECA grows with the image and with depth: time and memory against the plain backbone, plotted."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import alternate, environment, ratios
from memory import saved_bytes
from speed import RESULTS, step_of
from systems import create

SYSTEMS = ("plain", "eca", "timm's eca")
SIZES = (224, 448, 672, 896)
DEPTHS = (18, 34, 50, 101, 152)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each point (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="pixels (default: %(default)s)")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="layers (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json", help="JSON file; the plot goes beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    points = {
        "size": {size: point("resnet50", size, args.rounds) for size in args.sizes},
        "depth": {depth: point(f"resnet{depth}", 224, args.rounds) for depth in args.depths},
    }
    results = {**points, "rounds": args.rounds, "environment": environment()}
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    plot(points, args.out.with_suffix(".png"), results["environment"])


def point(backbone: str, size: int, rounds: int) -> dict[str, Any]:
    """Return, for one image, each system's bytes kept for the backward pass and its time, over the plain one's."""
    x = torch.randn(1, 3, size, size)
    models = {system: create(backbone, system) for system in SYSTEMS}
    kept = {system: saved_bytes(model, torch.cat([x, x])) for system, model in models.items()}
    figures: dict[str, Any] = {"memory": {system: kept[system] / kept["plain"] for system in SYSTEMS}}
    for mode in ("inference", "training"):
        steps = {s: step_of(m, torch.cat([x, x]) if mode == "training" else x, mode, False) for s, m in models.items()}
        speed = ratios(alternate(steps, rounds), "plain")
        figures[mode] = {system: 1 / speed[system]["median"] for system in SYSTEMS}
    return figures


def plot(points: dict[str, Any], path: Path, made: dict[str, Any]) -> None:
    """Draw cost over that of the plain backbone: one row for the image's size, one for depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"size": "ResNet-50: side of the image, pixels", "depth": "224 pixels: layers of the ResNet"}
    titles = {"memory": "memory kept for backward", "inference": "time, inference", "training": "time, training step"}
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), sharey="col", layout="constrained")
    for row, (what, by_value) in zip(axes, points.items()):
        for axis, (measure, title) in zip(row, titles.items()):
            for system in SYSTEMS[1:]:
                axis.plot(list(by_value), [v[measure][system] for v in by_value.values()], marker="o", label=system)
            axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            axis.set(title=title, xlabel=labels[what], ylabel="over the plain backbone", xticks=list(by_value))
    axes[0, 0].legend()
    figure.suptitle(
        f"Cost of ECA; {made['threads']} CPU threads, torch {made['torch']}, {made['date'][:10]}", fontsize=10
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

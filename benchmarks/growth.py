"""How the cost of ECA grows with the image and with depth: time and memory against the plain backbone, plotted.

A point that is done is kept in the results file and not run again, as in speed.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import alternate, environment, ratios
from memory import saved_bytes
from networks import step_of
from speed import RESULTS
from systems import create
from tqdm import tqdm

SYSTEMS = ("plain", "eca", "timm's eca")
SIZES = (224, 448, 672, 896)
DEPTHS = (18, 34, 50, 101, 152)
BATCH = {"inference": 1, "training": 2}  # the least that batch norm trains with where maps shrink to a pixel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each point (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="pixels, ResNet-50 (default: %(default)s)")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="layers, 224 pixels (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="measure points anew that are in the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json", help="JSON file; the plot goes beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    points = json.loads(args.out.read_text())["points"] if args.out.exists() else {}
    rows = {"size": [(50, size) for size in args.sizes], "depth": [(depth, 224) for depth in args.depths]}
    for depth, size in tqdm(dict.fromkeys(rows["size"] + rows["depth"]), desc="points"):
        if args.again or name_of(depth, size) not in points:
            points[name_of(depth, size)] = {**point(depth, size, args.rounds), "environment": environment()}
            args.out.write_text(json.dumps({"points": points}, indent=2) + "\n")
    plot(points, rows, args.out.with_suffix(".png"))


def name_of(depth: int, size: int) -> str:
    return f"resnet{depth} {size}"


def point(depth: int, size: int, rounds: int) -> dict[str, Any]:
    """Return each system's bytes kept for the backward pass, and its ratios of time, of the plain backbone's."""
    models = {system: create(f"resnet{depth}", system) for system in SYSTEMS}
    pixels = {mode: torch.randn(batch, 3, size, size) for mode, batch in BATCH.items()}
    kept = {system: saved_bytes(model, pixels["training"]) for system, model in models.items()}
    figures: dict[str, Any] = {"memory": {system: kept[system] / kept["plain"] for system in SYSTEMS}}
    for mode, x in pixels.items():
        steps = {system: step_of(model, x, mode, compiled=False) for system, model in models.items()}
        figures[mode] = ratios(alternate(steps, rounds), "plain")
    return figures


def plot(points: dict[str, Any], rows: dict[str, list[tuple[int, int]]], path: Path) -> None:
    """Draw cost over that of the plain backbone: one row for the image's size, one for depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"size": "ResNet-50: side of the image, pixels", "depth": "224 pixels: layers of the ResNet"}
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), sharey="col", layout="constrained")
    for row, (what, of_row) in zip(axes, rows.items()):
        values = [depth if what == "depth" else size for depth, size in of_row]
        for axis, quantity in zip(row, ("memory", "inference", "training")):
            for system in SYSTEMS[1:]:
                costs = [cost(points[name_of(*at)][quantity][system]) for at in of_row]
                low, middle, high = zip(*costs)
                (line,) = axis.plot(values, middle, marker="o", label=system)
                axis.fill_between(values, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
            axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
            title = "memory kept for backward" if quantity == "memory" else f"time, {quantity}, batch {BATCH[quantity]}"
            axis.set(title=title, xlabel=labels[what], ylabel="over the plain backbone", xticks=values)
    axes[0, 0].legend()
    made = [points[name_of(*at)]["environment"] for of_row in rows.values() for at in of_row]
    told = "; ".join(sorted({f"{e['threads']} CPU thread(s), torch {e['torch']}, {e['date'][:10]}" for e in made}))
    figure.suptitle(f"Cost of attention, below 1 is less; shaded: quartiles. {told}", fontsize=10)
    figure.savefig(path, dpi=120)


def cost(figure: Any) -> tuple[float, float, float]:
    """Return a cost over the plain backbone's, and its quartiles before and after; what is counted has no spread."""
    if isinstance(figure, float):
        return figure, figure, figure
    return 1 / figure["quartile_high"], 1 / figure["median"], 1 / figure["quartile_low"]


if __name__ == "__main__":
    main()

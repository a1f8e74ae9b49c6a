"""Figure 1 of the paper: accuracy against complexity. Accuracies are the paper's, complexity is counted here.

Writes figure1.png and its data, figure1.json, to benchmarks/results or the folder given.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from timm_eca.complexity import paper_tables
from timm_eca.complexity.compare import compare
from timm_eca.complexity.counting import check_counter
from timm_eca.paper import UNITS

RESULTS = Path(__file__).parent / "results"
METHODS = ("ResNet", "SENet", "CBAM", "A2-Nets", "ECA-Net")
CAPTION = (
    "Accuracies: ImageNet, quoted from Table 3 of the paper (CVPR 2020); nothing was trained here.\n"
    "Parameters and multiply-adds (areas of the circles): counted here on this project's models."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write (default: %(default)s)")
    out = parser.parse_args().out
    check_counter()
    out.mkdir(parents=True, exist_ok=True)
    bubbles = figure_1_data()
    (out / "figure1.json").write_text(json.dumps({"caption": CAPTION, "bubbles": bubbles}, indent=2) + "\n")
    plot_figure_1(bubbles, out / "figure1.png")
    print(out / "figure1.png")


def figure_1_data() -> list[dict[str, Any]]:
    """Return backbone, method, top-1 (quoted), parameters and multiply-adds (counted) of each bubble."""
    counted = {(line.model, line.quantity): line.here * UNITS[line.unit] for line in compare("table_3")}
    return [
        {
            "backbone": row["backbone"],
            "method": row["method"],
            "top1": float(row["top1"]),
            "parameters": round(counted[f"{row['backbone']} {row['method']}", "parameters"]),
            "multiply_adds": round(counted[f"{row['backbone']} {row['method']}", "multiply-adds"]),
        }
        for row in paper_tables()["tables"]["table_3"]["rows"]
        if row["backbone"].startswith("resnet") and row["method"] in METHODS
    ]


def plot_figure_1(bubbles: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        mine = [b for b in bubbles if b["method"] == method]
        x, y = [b["parameters"] / 2**20 for b in mine], [b["top1"] for b in mine]
        drawn = axes.scatter(x, y, [b["multiply_adds"] / 1.5e7 for b in mine], alpha=0.5)
        axes.plot(x, y, color=drawn.get_facecolor()[0], alpha=1, marker=".", label=method)
        for bubble, *place in zip(mine, x, y):
            name = bubble["backbone"].removeprefix("resnet")
            axes.annotate(name, place, (0, 4), textcoords="offset points", fontsize=7, ha="center")
    axes.set(xlabel="parameters (2^20)", ylabel="ImageNet top-1 (%), quoted")
    axes.margins(0.15)
    axes.legend(loc="lower right")
    figure.suptitle(CAPTION, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

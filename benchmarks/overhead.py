"""What the package costs before a model runs: in `create_model` and in import.

Alternated runs, median of the per-round ratios or differences, with quartiles. Prints a table and writes JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import environment, summary, timed

MODELS = ("resnet50", "convnext_tiny", "mobilenetv2_100")  # a slot of the block; forwards made for the layer
RESULTS = Path(__file__).parent / "results" / "overhead.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of create_model (default: %(default)s)")
    parser.add_argument("--imports", type=int, default=15, help="rounds of import (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    results = {
        "create_model_ratio": {name: create_model_ratio(name, args.rounds) for name in MODELS},
        "import_seconds_added": import_seconds_added(args.imports),
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def create_model_ratio(name: str, rounds: int) -> dict[str, float]:
    """Time of `create_model(name, attn_layer='eca')` over that of `create_model(name)`."""
    import timm

    import timm_eca  # noqa: F401

    def seconds(**kwargs: str) -> float:
        return timed(lambda: timm.create_model(name, **kwargs))

    seconds(), seconds(attn_layer="eca")  # warm up
    ratios = []
    for index in range(rounds):
        first, second = ({}, {"attn_layer": "eca"}) if index % 2 else ({"attn_layer": "eca"}, {})
        times = {len(kwargs): seconds(**kwargs) for kwargs in (first, second)}
        ratios.append(times[1] / times[0])
    return summary(ratios)


def import_seconds_added(rounds: int) -> dict[str, float]:
    """Seconds that `import timm_eca` takes after `import timm`, each in a fresh interpreter."""
    code = "import timm, time; t = time.perf_counter(); import timm_eca; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(rounds + 1)]
    return summary([float(run.stdout) for run in runs[1:]])  # the first one compiles and fills caches


if __name__ == "__main__":
    main()

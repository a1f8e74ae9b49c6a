"""Write the tables of docs/fused.md, and the short one of README.md, from what memory.py and speed.py measured."""

import json
import re
from pathlib import Path

import memory
import speed

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "fused.md")
TABLES = {"memory": memory.markdown, "tail": lambda r: speed.markdown(r["cells"]), "speed": None}
TABLES["speed"] = TABLES["tail"]
SHORT = "fused tails in short"
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenetv2_100": "MobileNetV2"}


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))


def render(text: str) -> str:
    """Return a text with what stands between `<!-- NAME -->` and `<!-- end -->` made anew from the results."""
    blocks = {SHORT: _short_table()}
    for name, table in TABLES.items():
        results = _results(name)
        blocks[name] = f"{table(results)}\n\n{_provenance(results)}"
    for name, block in blocks.items():
        whole = f"<!-- {name} -->\n{block}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, whole=whole: whole, text, flags=re.DOTALL)
    return text


def _results(name: str) -> dict:
    return json.loads((speed.RESULTS / f"{name}.json").read_text())


def _short_table() -> str:
    """Memory and eager speed of three networks, for the README."""
    memory_of, cells = _results("memory")["mib_per_image"], _results("speed")["cells"]
    lines = [
        "| | MiB kept per image: plain | here | timm's ECA | training speed: here | timm's ECA"
        " | inference speed: here | timm's ECA |",
        "|---|" + "---:|" * 7,
    ]
    for model, name in NETWORKS.items():
        kept = [f"{memory_of[model][kind]:.1f}" for kind in ("plain", "eca", "timm's eca")]
        ratios = [cells[f"{model} {mode} 8 nchw eager 224 kept"]["ratio"] for mode in ("training", "inference")]
        speeds = [f"{ratio[kind]['median']:.2f}" for ratio in ratios for kind in ("eca", "timm's eca")]
        lines.append(f"| {name} | {' | '.join([*kept, *speeds])} |")
    return "\n".join(lines)


def _provenance(results: dict) -> str:
    made = (
        [results["environment"]] if "environment" in results else [c["environment"] for c in results["cells"].values()]
    )
    told = {
        f"{e['machine']} ({e['instructions']}), {e['threads']} of {e['cores']} cores, torch {e['torch']}, timm"
        f" {e['timm']}, {e['date'][:10]}"
        for e in made
    }
    return "; ".join(sorted(told)) + "."


if __name__ == "__main__":
    main()

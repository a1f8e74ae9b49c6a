"""Write the tables of docs/fused.md from the results of memory.py, speed.py and speed.py --tail."""

import json
import re
from pathlib import Path

import memory
import speed

DOCS = Path(__file__).parents[1] / "docs" / "fused.md"
TABLES = {"memory": memory.markdown, "tail": lambda r: speed.markdown(r["cells"]), "speed": None}
TABLES["speed"] = TABLES["tail"]


def main() -> None:
    DOCS.write_text(render(DOCS.read_text()))


def render(text: str) -> str:
    """Return a text with what stands between `<!-- NAME -->` and `<!-- end -->` made anew from results/NAME.json."""
    for name, table in TABLES.items():
        path = speed.RESULTS / f"{name}.json"
        results = json.loads(path.read_text())
        block = f"<!-- {name} -->\n{table(results)}\n\n{_provenance(results)}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


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

"""Write the full complexity report to benchmarks/results/ in three formats, and its short form into README.md.

The counting itself is `timm-eca complexity`, which works without this folder; so do the paper's numbers, package data
of timm_eca.
"""

import argparse
from pathlib import Path

from timm_eca.complexity import complexity_report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SUFFIXES = {"markdown": "md", "csv": "csv", "json": "json"}
BEGIN, END = "<!-- timm-eca complexity table_3 -->", "<!-- end -->"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for form, suffix in SUFFIXES.items():
        path = RESULTS / f"complexity.{suffix}"
        path.write_text(complexity_report(form=form))
        print(path)
    readme = ROOT / "README.md"
    readme.write_text(with_block(readme.read_text()))
    print(readme)


def with_block(readme: str) -> str:
    """Return the README with its generated block made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{complexity_report(['table_3'])}{END}{after}"


if __name__ == "__main__":
    main()

"""Every number quoted from the paper, its supplement and the README of its code, as printed there."""

import functools
import json
from importlib.resources import files
from typing import Any

__all__ = ["UNITS", "decimals", "paper_tables"]

UNITS = {"1": 1, "10^6": 10**6, "10^9": 10**9, "2^20": 2**20, "2^30": 2**30}
"""Units by their name in the tables. The paper's M and G of classification are binary, those of detection decimal."""


@functools.cache
def paper_tables() -> dict[str, Any]:
    """Return the contents of paper_tables.json: sources, headline, recipes, and tables with a title, a source and rows.

    Numbers are strings, as printed, because their digits tell how exact they are. Parameters and FLOPs are in the
    table's `params_unit` and `flops_unit`, or in the row's own.
    """
    return json.loads((files(__package__) / "paper_tables.json").read_text(encoding="utf-8"))


def decimals(printed: str) -> int:
    """Return the number of digits after the point of a number as printed."""
    return len(printed.partition(".")[2])

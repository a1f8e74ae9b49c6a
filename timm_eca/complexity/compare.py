"""Line by line: what a table prints, what this project counts, the difference."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..inject import add_attn_, attn_modules
from ..paper import UNITS, decimals, paper_tables
from .counting import count
from .detectors import build_detector, trainable
from .systems import plain, readings

__all__ = ["COUNTER", "FLOPS_TOLERANCE", "TABLES", "Comparison", "compare"]

COUNTER = "thop-2019"
"""The counter whose rules were the paper's."""

FLOPS_TOLERANCE = 0.005
"""Share by which multiply-adds may differ: what beside convolutions counts, and in which module, is a convention."""


@dataclass(frozen=True)
class Comparison:
    """One number of the paper beside this project's.

    Attributes:
        table: Key in `paper_tables()['tables']`.
        source: Where the number is printed, a key of `paper_tables()['sources']`.
        model: What the row is about.
        quantity: 'parameters' or 'multiply-adds'.
        unit: Unit of the numbers, a key of `UNITS`.
        paper: The number as printed.
        here: The number counted here.
        note: How the row was read; where it does not agree, what each reading tried gives.
    """

    table: str
    source: str
    model: str
    quantity: str
    unit: str
    paper: str
    here: float
    note: str

    @property
    def here_printed(self) -> str:
        """The number counted here with as many digits as the paper's has."""
        return f"{self.here:.{decimals(self.paper)}f}"

    @property
    def difference(self) -> float:
        """Counted here minus printed there."""
        return self.here - float(self.paper)

    @property
    def agrees(self) -> bool:
        """Whether it rounds to the printed digits (parameters) or is within `FLOPS_TOLERANCE` (multiply-adds)."""
        if self.quantity == "parameters":
            return self.here_printed == self.paper
        return abs(self.difference) <= FLOPS_TOLERANCE * float(self.paper)

    @property
    def agrees_without_its_zero(self) -> bool:
        """Whether parameters agree but for a last zero, with which tables fill up a number of fewer digits."""
        shorter = self.paper.removesuffix("0")
        return self.quantity == "parameters" and shorter != self.paper and replace(self, paper=shorter).agrees


@functools.cache
def compare(table: str) -> tuple[Comparison, ...]:
    """Return the comparisons of a table, a key of `TABLES`."""
    return tuple(TABLES[table](table))


# Weights of one module with C channels, kernel size k and r = 16, by the formula that Table 2 prints.
_FORMULAS: dict[str, Callable[[int, int], int]] = {
    "2C^2/r": lambda c, k: 2 * c * c // 16,
    "0": lambda c, k: 0,
    "C": lambda c, k: c,
    "C^2": lambda c, k: c * c,
    "C^2/16": lambda c, k: c * c // 16,
    "16C": lambda c, k: 16 * c,
    "8C": lambda c, k: 8 * c,
    "kC": lambda c, k: k * c,
    "k": lambda c, k: k,
}


def _modules(table: str) -> Iterator[Comparison]:
    """Compare the weights of a table's modules, summed over the blocks of a ResNet-50, with k = 3."""
    meta = paper_tables()["tables"][table]
    for row in meta["rows"]:
        if "layer" not in row:
            continue
        kwargs = {"kernel_size": 3} if row["layer"] == "eca_ns" else {}
        model: Any = add_attn_(plain("resnet50"), row["layer"], attn_kwargs=kwargs)
        formula = sum(_FORMULAS[row["parameters"]](site.channels, 3) for site in model.attn_sites)
        ours = sum(p.numel() for layer in attn_modules(model).values() for p in layer.parameters())
        note = f"{row['parameters']} over the 16 blocks of ResNet-50, k = 3, r = 16"
        module = f"{row['module']}, {row['parameters']} a module"
        yield Comparison(table, meta["source"], module, "parameters", "1", str(formula), ours, note)


def _classification(table: str) -> Iterator[Comparison]:
    """Compare a table's models by parameters and multiply-adds for one image of 224 x 224."""
    meta = paper_tables()["tables"][table]
    for row in meta["rows"]:
        model = f"{row['backbone']} {row['method']}"
        params: list[Comparison] = []
        flops: list[Comparison] = []
        for reading in readings(row["method"], row["backbone"], table):
            cost = count(reading.build(row["backbone"]), (COUNTER,))
            unit = reading.params_unit or row.get("params_unit", meta["params_unit"])
            here = cost.parameters / UNITS[unit]
            line = Comparison(table, meta["source"], model, "parameters", unit, row["params"], here, reading.label)
            params.append(line)
            unit = reading.flops_unit or row.get("flops_unit", meta["flops_unit"])
            here = cost.operations[COUNTER] / UNITS[unit]
            flops.append(replace(line, quantity="multiply-adds", unit=unit, paper=row["flops"], here=here))
        yield _first(params)
        yield _first(flops)


# Copied from GCNet's paper, whose detectors have the paper's parameters plus those of the frozen layers.
_OF_ANOTHER_PAPER = ("GCNet", "NL")


def _detection(table: str) -> Iterator[Comparison]:
    """Compare a table's detectors by trainable parameters."""
    meta = paper_tables()["tables"][table]
    unit = meta["params_unit"]
    for row in meta["rows"]:
        reading = readings(row["method"], row["backbone"], table)[0]
        detector = build_detector(row["detector"], reading.build(row["backbone"]))
        everything = sum(p.numel() for p in detector.parameters())
        model = f"{row['detector']} {row['backbone']} {row['method']}"
        line = Comparison(
            table=table,
            source=row.get("source", meta["source"]),
            model=model,
            quantity="parameters",
            unit=unit,
            paper=row["params"],
            here=trainable(detector) / UNITS[unit],
            note=f"{reading.label}; trainable",
        )
        tried = [line, replace(line, here=everything / UNITS[unit], note=f"{reading.label}; frozen too")]
        yield _first(tried[::-1] if row["method"] in _OF_ANOTHER_PAPER else tried)


def _first(tried: list[Comparison]) -> Comparison:
    """Return the first of the readings tried; where it does not agree, with what each one gives as its note."""
    if tried[0].agrees:
        return tried[0]
    results = "; ".join(f"{line.note}: {line.here:.{decimals(line.paper) + 1}f} x {line.unit}" for line in tried)
    rounded = [line.note for line in tried if line.agrees_without_its_zero]
    remark = f". Without the last zero of the printed number these agree: {'; '.join(rounded)}" if rounded else ""
    return replace(tried[0], note=f"tried: {results}{remark}")


TABLES: dict[str, Callable[[str], Iterator[Comparison]]] = {
    "table_2": _modules,
    "table_3": _classification,
    "table_a": _classification,
    "table_5": _detection,
    "table_6": _detection,
}

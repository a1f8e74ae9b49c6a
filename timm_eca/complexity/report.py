"""`timm-eca complexity`: the comparisons, the headline and the grid as Markdown, CSV or JSON."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..paper import paper_tables
from ..whole_file import write_whole
from .compare import TABLES, compare
from .counting import COUNTERS, check_counter
from .grid import grid
from .headline import HEADLINE_UNITS, headline
from .markdown import grid_markdown, headline_markdown, table_markdown

__all__ = ["FORMATS", "SECTIONS", "complexity_report", "run_complexity"]

SECTIONS = (*TABLES, "headline", "grid")


def run_complexity(sections: Sequence[str] | None, form: str, out: Path | None) -> None:
    """Print the report, or write it to a file that appears whole or not at all.

    Args:
        sections: Names from `SECTIONS`; None or empty: all.
        form: A key of `FORMATS`.
        out: File to write; None: standard output.

    Raises:
        CommandError: If ultralytics-thop is missing, a name is unknown or the file cannot be written.
    """
    report = complexity_report(sections, form)
    if out is None:
        print(report, end="")
    else:
        _write(out, report)


def complexity_report(sections: Sequence[str] | None = None, form: str = "markdown") -> str:
    """Return the report as text; arguments and errors as `run_complexity`."""
    wanted = tuple(sections or SECTIONS)
    for given, accepted, what in ((wanted, SECTIONS, "section"), ((form,), tuple(FORMATS), "format")):
        unknown = [name for name in given if name not in accepted]
        if unknown:
            raise CommandError(f"unknown {what} {', '.join(unknown)}. Accepted: {', '.join(accepted)}.")
    check_counter()
    return FORMATS[form](tuple(name for name in SECTIONS if name in wanted))


def _markdown(sections: tuple[str, ...]) -> str:
    parts = []
    for name in sections:
        if name == "headline":
            parts.append(headline_markdown(*headline()))
        elif name == "grid":
            parts.append(grid_markdown(grid()))
        else:
            parts.append(table_markdown(compare(name)))
    return "\n\n".join(parts) + "\n"


def _csv(sections: tuple[str, ...]) -> str:
    records = _records(sections)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _json(sections: tuple[str, ...]) -> str:
    meta = {
        "sources": paper_tables()["sources"],
        "counters": COUNTERS,
        "versions": {name: version(name) for name in ("timm-eca", "timm", "torch", "ultralytics-thop")},
    }
    return json.dumps({**meta, "lines": _records(sections)}, indent=2) + "\n"


def _records(sections: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one flat record for each number, in the order of the sections."""
    lines = [line for name in sections if name in TABLES for line in compare(name)]
    records = [asdict(line) | {"difference": line.difference, "agrees": line.agrees} for line in lines]
    if "headline" in sections:
        records += _headline_records()
    if "grid" in sections:
        for cell in grid():
            model = f"{cell.backbone} {cell.method}"
            records.append(_record("grid", model, "parameters", "1", cell.cost.parameters, "every block"))
            for counter, operations in cell.cost.operations.items():
                records.append(_record("grid", model, "multiply-adds", "1", operations, f"every block; {counter}"))
    return records


def _headline_records() -> list[dict[str, Any]]:
    quoted = paper_tables()["headline"]
    parameters, counts = headline()
    ours = float(parameters)
    lines = [
        ("parameters", "1", quoted["parameters"], ours, ours == float(quoted["parameters"]), "released kernel sizes")
    ]
    for one in counts:
        for unit in HEADLINE_UNITS:
            lines.append(("multiply-adds", unit, quoted["gflops"], one.gflops(unit), one.agrees(unit), one.label))
    return [
        _record("headline", f"{quoted['backbone']} ECA modules", quantity, unit, here, note)
        | {"source": quoted["source"], "paper": printed, "difference": here - float(printed), "agrees": agrees}
        for quantity, unit, printed, here, agrees, note in lines
    ]


def _record(table: str, model: str, quantity: str, unit: str, here: float, note: str) -> dict[str, Any]:
    line: dict[str, Any] = {"table": table, "source": None, "model": model, "quantity": quantity, "unit": unit}
    return line | {"paper": None, "here": here, "note": note, "difference": None, "agrees": None}


FORMATS: dict[str, Callable[[tuple[str, ...]], str]] = {"markdown": _markdown, "csv": _csv, "json": _json}


def _write(out: Path, text: str) -> None:
    out = out.expanduser().absolute()
    if out.is_dir():
        raise CommandError(f"{out} is a folder. Give a file with --out.")
    try:
        write_whole(out, text.encode())
    except OSError as error:
        raise CommandError(f"cannot write to {out}: {error.strerror or error}. Give another file with --out.") from None

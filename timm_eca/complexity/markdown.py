"""The sections of the report as Markdown tables."""

from collections.abc import Iterable, Sequence

from ..paper import paper_tables
from .compare import Comparison
from .grid import Cell
from .headline import HEADLINE_UNITS, HeadlineCount, as_printed

__all__ = ["grid_markdown", "headline_markdown", "table_markdown"]


def table_markdown(lines: Sequence[Comparison]) -> str:
    """Return one of the paper's tables, each row with paper, here, difference and unit, and notes on disagreements."""
    meta = paper_tables()["tables"][lines[0].table]
    by_model: dict[str, list[Comparison]] = {}
    for line in lines:
        by_model.setdefault(line.model, []).append(line)
    quantities = list(dict.fromkeys(line.quantity for line in lines))
    header = ["model"] + [cell for q in quantities for cell in (f"{q}: paper", "here", "difference", "unit")]
    rows, notes = [], []
    for model, cells in by_model.items():
        row = [model]
        for line in cells:
            mark = ""
            if not line.agrees:
                notes.append(f"{model}, {line.quantity}: {line.note}.")
                mark = f" [{len(notes)}]"
            row += [line.paper, line.here_printed + mark, _signed(line), line.unit]
        rows.append(row)
    source = paper_tables()["sources"][meta["source"]]
    numbered = "".join(f"\n{number}. {note}" for number, note in enumerate(notes, 1))
    return f"**{meta['title']}** ({source})\n\n{_table(header, rows)}" + (f"\n{numbered}" if notes else "")


def headline_markdown(parameters: int, counts: Sequence[HeadlineCount]) -> str:
    """Return the headline's paragraph and its counts."""
    quoted = paper_tables()["headline"]
    header = ["what is counted", "operations", *(f"GFLOPs, {unit}" for unit in HEADLINE_UNITS)]
    rows = []
    matches = []
    for one in counts:
        rows.append([one.label, f"{one.operations:,.0f}", *(as_printed(one.gflops(unit)) for unit in HEADLINE_UNITS)])
        matches += [f"{one.label}, in {unit}" for unit in HEADLINE_UNITS if one.agrees(unit)]
    verdict = (
        f"Of those tried, this gives the figure: {'; '.join(matches)}." if matches else "None of those tried gives it."
    )
    return (
        f"**The headline**: the paper says {quoted['parameters']} parameters and {quoted['gflops']} GFLOPs for all ECA"
        f" modules of {quoted['backbone']}. The parameters are those of the released kernel sizes, {parameters}. The"
        f" GFLOPs depend on what is counted. {verdict} That the authors counted so is a guess from the number. Their"
        " counter was thop: each of its 26 releases from June 2019 (0.0.22) to April 2020 (0.0.31) that still run gives"
        " the third line on their code. The convolutions alone, the operations that ECA adds, are the first.\n\n"
        + _table(header, rows)
    )


def grid_markdown(cells: Sequence[Cell]) -> str:
    """Return the grid of backbones and methods: parameters in 10^6, multiply-adds in 10^9 by all counters."""
    rows = [
        [
            cell.backbone,
            cell.method,
            f"{cell.cost.parameters / 1e6:.3f}",
            *(f"{operations / 1e9:.3f}" for operations in cell.cost.operations.values()),
        ]
        for cell in cells
    ]
    header = ["backbone", "method", "parameters, 10^6"]
    header += [f"{counter}, 10^9" for counter in cells[0].cost.operations]
    title = (
        "**Every backbone with every system**, a layer in each block, where `attn_layer=` puts it. A2, GSoP and AA as"
        " their papers place them, in few blocks or in place of convolutions, are in Table 3."
    )
    return f"{title}\n\n{_table(header, rows)}"


def _signed(line: Comparison) -> str:
    digits = max(len(line.here_printed.partition(".")[2]), 1) + 1 if line.unit != "1" else 0
    return f"{line.difference:+.{digits}f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

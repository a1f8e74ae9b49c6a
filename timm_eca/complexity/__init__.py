"""The paper's complexity tables, counted again: parameters and multiply-adds of this package's models beside them."""

from ..paper import paper_tables
from .report import complexity_report, run_complexity

__all__ = ["complexity_report", "paper_tables", "run_complexity"]

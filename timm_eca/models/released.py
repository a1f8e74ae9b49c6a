"""The models whose weights the paper's authors released, with what they reported of them; all figures from the tables.

The README of their code and the paper, or its supplement, differ for two of the models: both figures are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..paper import paper_tables

__all__ = ["RELEASED", "TAG", "Recipe", "Released"]

TAG = "ecanet_in1k"
"""Of the released weights, in timm's names: 'eca_resnet50.ecanet_in1k'."""


@dataclass(frozen=True)
class Recipe:
    """How a model was trained, in words; all on ImageNet-1k, 224 x 224."""

    optimizer: str
    schedule: str
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class Released:
    """One released model.

    Attributes:
        top1: Top-1 accuracy of the released file on ImageNet-1k val in percent, authors' README.
        top5: Top-5 accuracy, likewise.
        paper_top1: Top-1 accuracy in the paper.
        paper_top5: Top-5 accuracy in the paper.
        paper_table: Where in the paper.
        multiply_adds: For one image of 224 x 224 as the authors' README gives it; M is 2^20, G 2^30.
        recipe: How it was trained.
    """

    top1: float
    top5: float
    paper_top1: float
    paper_top5: float
    paper_table: str
    multiply_adds: str
    recipe: Recipe


def _recipe(data: Mapping[str, str]) -> Recipe:
    decay = f"weight decay {data['weight_decay']} on every parameter"
    dropout = f"; dropout {data['dropout']} before the classifier" if "dropout" in data else ""
    every = "every epoch" if data["decay_epochs"] == "1" else f"every {data['decay_epochs']} epochs"
    return Recipe(
        optimizer=f"{data['optimizer']}, momentum {data['momentum']}, {decay}{dropout}",
        schedule=f"learning rate {data['lr']}, times {data['decay_rate']} {every}",
        batch_size=int(data["batch_size"]),
        epochs=int(data["epochs"]),
    )


def _in_paper(backbone: str) -> tuple[Mapping[str, Any], str]:
    """Return a backbone's row with ECA in the paper or its supplement, and which table it is in."""
    for name in ("table_3", "table_a"):
        table = paper_tables()["tables"][name]
        where = table["title"].partition(":")[0]
        for row in table["rows"]:
            if (row["backbone"], row["method"]) == (backbone, "ECA-Net"):
                return row, where if table["source"] == "paper" else f"{table['source']}, {where}"
    raise AssertionError(f"{backbone} with ECA is in no table of the paper.")


def _released(row: Mapping[str, Any], flops_unit: str) -> Released:
    in_paper, where = _in_paper(row["backbone"])
    family = "mobilenetv2" if row["backbone"].startswith("mobilenetv2") else "resnet"
    return Released(
        top1=float(row["top1"]),
        top5=float(row["top5"]),
        paper_top1=float(in_paper["top1"]),
        paper_top5=float(in_paper["top5"]),
        paper_table=where,
        multiply_adds=row["flops"] + {"2^20": "M", "2^30": "G"}[row.get("flops_unit", flops_unit)],
        recipe=_recipe(paper_tables()["recipes"][family]),
    )


_README = paper_tables()["tables"]["readme"]

RELEASED = {f"eca_{row['backbone']}": _released(row, _README["flops_unit"]) for row in _README["rows"]}
"""By the name of this package's entrypoint."""

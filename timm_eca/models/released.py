"""What the paper's authors released and reported, as data: one row per model, each figure with its source.

Sources: the README of https://github.com/BangguWu/ECANet for the released files; ECA-Net, CVPR 2020, Table 3, and its
supplement, Table A, for the paper. They differ for two models.
"""

from dataclasses import dataclass

__all__ = ["RELEASED", "Recipe", "Released"]


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


_RESNET = Recipe(
    optimizer="SGD, momentum 0.9, weight decay 1e-4 on every parameter",
    schedule="learning rate 0.1, divided by 10 every 30 epochs",
    batch_size=256,
    epochs=100,
)
_MOBILENET = Recipe(
    optimizer="SGD, momentum 0.9, weight decay 4e-5 on every parameter; dropout 0.25 before the classifier",
    schedule="learning rate 0.045, times 0.98 every epoch",
    batch_size=96,
    epochs=400,
)

RELEASED = {
    "eca_resnet18": Released(70.92, 89.93, 70.78, 89.92, "supplement, Table A", "1.70G", _RESNET),
    "eca_resnet34": Released(74.21, 91.83, 74.21, 91.83, "supplement, Table A", "3.43G", _RESNET),
    "eca_resnet50": Released(77.42, 93.62, 77.48, 93.68, "Table 3", "3.86G", _RESNET),
    "eca_resnet101": Released(78.65, 94.34, 78.65, 94.34, "Table 3", "7.35G", _RESNET),
    "eca_resnet152": Released(78.92, 94.55, 78.92, 94.55, "Table 3", "10.83G", _RESNET),
    "eca_mobilenetv2_100": Released(72.56, 90.81, 72.56, 90.81, "Table 3", "319.9M", _MOBILENET),
}

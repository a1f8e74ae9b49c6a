"""Counting with kept libraries: ultralytics-thop, the successor of the paper's counter, and torch's flop counter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CommandError

__all__ = ["COUNTERS", "Count", "check_counter", "count"]

COUNTERS = {
    "thop-2019": "ultralytics-thop with the rules of thop in July 2019, which give the paper's numbers: each output"
    " of a ReLU counts one, a linear layer counts additions beside multiplications",
    "thop": "ultralytics-thop",
    "torch": "torch.utils.flop_counter, halved: convolutions and matrix products only",
}


@dataclass(frozen=True)
class Count:
    """What a model costs.

    Attributes:
        parameters: Number of parameters.
        operations: Multiply-adds for one image, by counter (a key of `COUNTERS`).
    """

    parameters: int
    operations: dict[str, float]


def check_counter() -> None:
    """Raise CommandError where ultralytics-thop is missing."""
    try:
        import thop  # noqa: F401
    except ImportError:
        raise CommandError("counting needs ultralytics-thop: pip install ultralytics-thop") from None


def count(model: nn.Module, counters: Sequence[str] = tuple(COUNTERS), size: int = 224) -> Count:
    """Count a model's parameters and its multiply-adds for one image of size x size.

    Made for models on the meta device, which hold no numbers and compute none.
    """
    model = model.eval()
    image = torch.empty(1, 3, size, size, device=next(model.parameters()).device)
    return Count(
        parameters=sum(p.numel() for p in model.parameters()),
        operations={name: _OPERATIONS[name](model, image) for name in counters},
    )


def _thop(rules: dict[type, Any]) -> Callable[[nn.Module, torch.Tensor], float]:
    def operations(model: nn.Module, image: torch.Tensor) -> float:
        from thop import profile

        return profile(model, (image,), custom_ops=rules, verbose=False)[0]

    return operations


def _torch(model: nn.Module, image: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2


def _count_relu(layer: Any, _: Any, output: torch.Tensor) -> None:
    layer.total_ops += output.numel()


def _count_linear(layer: Any, _: Any, output: torch.Tensor) -> None:
    layer.total_ops += (2 * layer.in_features - 1) * output.numel()


_OPERATIONS = {
    "thop-2019": _thop({nn.ReLU: _count_relu, nn.ReLU6: _count_relu, nn.Linear: _count_linear}),
    "thop": _thop({}),
    "torch": _torch,
}

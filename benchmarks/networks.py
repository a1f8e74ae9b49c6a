"""Whole networks, one system beside the other: the plain backbone and it with attention."""

from collections.abc import Callable
from typing import Any

import torch
from measure import Timed, alternate
from systems import SYSTEMS, create
from torch import nn

__all__ = ["step_of", "time_networks"]


def time_networks(
    backbone: str,
    mode: str,
    batch: int,
    layout: Any,
    compiled: bool,
    size: int,
    rounds: int,
    device: str,
    autocast: bool = False,
) -> Timed:
    """Return what the rounds of each system took."""
    torch.compiler.reset()  # of what was compiled for other cells
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    systems = [s for s in SYSTEMS if s != "eca, plain path"]
    models = {s: create(backbone, s).to(device).to(memory_format=layout) for s in systems}
    steps = {s: step_of(model, x, mode, compiled, autocast) for s, model in models.items()}
    return Timed(alternate(steps, rounds, warm_up=3, device=device))


def step_of(
    model: nn.Module, x: torch.Tensor, mode: str, compiled: bool, autocast: bool = False
) -> Callable[[], object]:
    """Return one inference, or one forward and backward pass; the forward pass in bfloat16 under autocast."""
    model.train(mode == "training")
    call: Any = torch.compile(model, fullgraph=True) if compiled else model

    def forward() -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return call(x)

    def infer() -> None:
        with torch.inference_mode():
            forward()

    def train() -> None:
        model.zero_grad()
        forward().sum().backward()

    return train if mode == "training" else infer

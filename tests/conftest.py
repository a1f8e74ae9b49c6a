"""Shared by all tests: one thread per worker, and helpers that many files use."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm weights and statistics away from their defaults, so that a wrong place or scale shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh interpreter, in an empty folder; its output is returned, a failure fails the test."""

    def run(code: str, **env: str) -> str:
        import os

        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent

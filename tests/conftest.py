"""Shared by all tests: one thread per worker, and helpers that many files use."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which decides then
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and so in all we start
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def _timm_without_doors():
    import timm_eca

    timm_eca.uninstall()
    yield
    timm_eca.install()


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh interpreter, in an empty folder; its output is returned, a failure fails the test."""

    def run(code: str, **env: str) -> str:
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


@pytest.fixture
def umask():
    """Set the umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def server():
    """A Hugging Face Hub on the loopback interface."""
    from hub_server import Hub

    with Hub() as hub:
        yield hub


@pytest.fixture
def client(server, tmp_path):
    """Make clients of the server, each with a fresh cache."""
    from hub_client import Client

    homes = iter(range(100))
    return lambda **kwargs: Client(server.url, tmp_path / f"home-{next(homes)}", **kwargs)


@pytest.fixture(scope="session")
def net():
    """A small model as it is published."""
    import timm

    import timm_eca  # noqa: F401

    torch.manual_seed(0)
    return randomize_(timm.create_model("eca_mobilenetv2_050"))


@pytest.fixture(scope="session")
def folder(net, tmp_path_factory):
    """The model's folder in Hub format."""
    from timm_eca import hub

    return hub.save(net, tmp_path_factory.mktemp("saved") / "eca_mobilenetv2_050.ecanet_in1k")


@pytest.fixture(scope="session")
def resnet18():
    """The official ECA-ResNet-18, stated independently."""
    from official import official

    torch.manual_seed(0)
    return randomize_(official("eca_resnet18")).eval()


@pytest.fixture
def saved(resnet18, tmp_path):
    """Save a checkpoint of the official ECA-ResNet-18, edited; returns its path."""
    from official import training_checkpoint

    def save(edit=None, name="model_best.pth.tar"):
        checkpoint = training_checkpoint(resnet18)
        if edit:
            checkpoint = edit(checkpoint) or checkpoint
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def fused_calls(monkeypatch):
    """The calls of fused tails, each by whether a ReLU ended it."""
    from timm_eca.fused import blocks

    made = []

    def count(parts, *args):
        made.append(parts.relu)  # before the call, which a checkpoint's second run does not return from
        out = tail(parts, *args)
        if out is None:
            made.pop()
        return out

    tail = blocks.eager_tail
    monkeypatch.setattr(blocks, "eager_tail", count)
    return made


@pytest.fixture
def all_maps_large(monkeypatch):
    """Have operators in compiled models on maps so small that it does not pay."""
    monkeypatch.setattr("timm_eca.fused.tail._SMALL", 0)
    monkeypatch.setattr("timm_eca.fused.tail._SMALL_INFERENCE", 0)


@pytest.fixture(params=["native", "gpu", "passes"])
def engine(request, monkeypatch):
    """Make the passes of one engine be taken by fused tails; the others' are not called.

    The kernels for GPUs run in Triton's interpreter, on a CPU.
    """
    from timm_eca.fused import native

    if request.param == "native" and not native.loaded():
        pytest.skip("the compiled passes are not built here")
    if request.param == "passes":
        monkeypatch.setattr(native, "_loaded", False)
    if request.param == "gpu":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture
def interpreted(monkeypatch):
    """Have tails on a CPU take the kernels for GPUs, interpreted."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles where there is a GPU, and does not interpret")
    monkeypatch.setattr("timm_eca.fused.native._loaded", False)
    monkeypatch.setattr("timm_eca.fused.gpu.takes", lambda *_: True)

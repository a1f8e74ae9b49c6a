"""Which library of compiled passes is loaded, and that each is right."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from timm_eca.fused import native

CAPABILITY = torch.backends.cpu.get_cpu_capability()
needs_library = pytest.mark.skipif(not native.loaded(), reason="the compiled passes are not built here")


def test_one_that_was_built_is_loaded():
    libraries = native._LIBRARIES.get(CAPABILITY, ())
    assert native.loaded() == any(find_spec(f"timm_eca.fused.{name}") for name in libraries)


@pytest.mark.parametrize(
    ("capability", "libraries"),
    [("AVX512", ["_native_avx512", "_native"]), ("AVX2", ["_native"]), ("DEFAULT", [])],
)
def test_best_is_asked_first(monkeypatch, capability, libraries):
    asked = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "_register", asked.append)
    assert not native._load()
    assert asked == libraries


@needs_library
def test_pytorch_without_the_interface(monkeypatch):
    monkeypatch.setattr(native, "_API", (*native._API[:-2], "no_such_function", native._API[-1]))
    assert not native._load()


@needs_library
def test_built_before(monkeypatch):
    monkeypatch.setattr(native, "_INTERFACE", native._INTERFACE + 1)
    assert not native._load()


@needs_library
def test_that_of_a_lesser_processor(tmp_path):
    """Where the one for AVX-512 is loaded, the other is held to the same oracles."""
    if CAPABILITY != "AVX512":
        pytest.skip("It is the one that all tests use here.")
    tests = Path(__file__).with_name("test_native.py")
    chosen = "TestNarrowMaps or TestLongRows or TestBothLayouts or TestMoreThreads or TestBFloat16"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", tests, "-k", chosen],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout

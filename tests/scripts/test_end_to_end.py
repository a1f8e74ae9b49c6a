"""timm's own scripts, not a stand-in: one model's life by `benchmarks/end_to_end.py`, and every name registered."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import timm

from real_checkout import REAL, needs_timms_scripts
from timm_eca.models import ENTRYPOINTS


@pytest.fixture(scope="module")
def told(tmp_path_factory, request):
    """The figures of one epoch and a resumed one; the run itself fails where two scripts disagree."""
    root = request.config.rootpath
    out = tmp_path_factory.mktemp("story") / "results.json"
    process = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "end_to_end.py"), "--epochs", "1", "--out", str(out)],
        env={**os.environ, "TIMM_SCRIPTS": str(REAL), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(out.read_text())


def check_figures(results, epochs):
    assert set(results["models"]) == {"eca_resnet18", "resnet18+eca"}
    for model in results["models"].values():
        rows, top1 = model["figures"]["epochs"], model["figures"]["top-1 (%)"]
        assert [row["epoch"] for row in rows] == list(range(epochs + 1))
        assert rows[epochs - 1]["eval_top1"] == pytest.approx(top1["validated"], abs=1e-3)
        assert top1["averaged"] == top1["from local-dir:"]
        assert top1["inferred"] in (None, pytest.approx(top1["averaged"], abs=1e-3))
        assert rows[-1]["train_loss"] < rows[0]["train_loss"]
        assert min(model["figures"]["images per second"].values()) > 0
        commands = [step["command"].split()[0] for step in model["steps"]]
        expected = ["train", "validate", "train", "avg-checkpoints", "validate", "validate"]
        assert commands[:6] == expected
        assert "benchmark" in commands


@needs_timms_scripts
def test_a_models_life(told):
    check_figures(told, epochs=1)


def test_results_kept(repository):
    """The run whose results stand in the repository."""
    results = json.loads((repository / "benchmarks" / "results" / "end_to_end.json").read_text())
    check_figures(results, epochs=4)
    assert {"python", "timm", "timm's scripts", "torch"} <= set(results["environment"])
    assert min(model["figures"]["top-1 (%)"]["validated"] for model in results["models"].values()) > 90


@needs_timms_scripts
def test_versions(told):
    assert told["environment"]["timm"] == timm.__version__


@needs_timms_scripts
def test_every_registered_name(run_python):
    """benchmark.py, inference and a training step, over all names of this package; Inception needs 75 pixels."""
    names = [entrypoint.__name__ for entrypoint in ENTRYPOINTS]
    options = shlex.split("--bench both --device cpu --img-size 80 -b 2 --num-warm-iter 1 --num-bench-iter 5")
    code = "from timm_eca.scripts import run_script\n"
    code += f"for name in {names}:\n    run_script('benchmark', ['--model', name, *{options}])"
    told = run_python(code, TIMM_SCRIPTS=str(REAL)).split("--result\n")[1:]
    results = [json.JSONDecoder().raw_decode(text)[0] for text in told]
    assert [result["model"] for result in results] == names
    for result in results:
        assert result["infer_samples_per_sec"] > 0
        assert result["train_samples_per_sec"] > 0

"""`benchmarks/run.py`: goes on after a kill, writes timm's columns; with small scripts, and with timm's own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from real_checkout import REAL, needs_timms_scripts
from small_checkout import HERE, make_checkout

BENCHMARKS = HERE.parents[1] / "benchmarks"
VALIDATION = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules run and tables, as `python benchmarks/run.py` finds them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run
    import tables

    yield run, tables
    for name in ("run", "tables"):
        del sys.modules[name]


def bench(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
    )


def test_goes_on_after_a_kill(tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    for script in ("validate.py", "benchmark.py"):
        shutil.copy(HERE / "small_bench.py", checkout / script)
    out, calls = tmp_path / "out", tmp_path / "calls"
    arguments = ["--models", "resnet18", "--pretrained", "--data", tmp_path, "--device", "cpu", "--out", out]
    env = {"TIMM_SCRIPTS": checkout, "CALLS": calls}
    killed = bench(*arguments, **env, KILL_AT="benchmark resnet18")
    assert killed.returncode == -signal.SIGKILL
    failed = bench(*arguments, **env, FAIL_AT="benchmark resnet18 attn_layer=eca")
    assert failed.returncode == 0, failed.stderr
    assert "resnet18+eca: benchmark failed, exit code 1: RuntimeError: out of memory" in (out / "table.md").read_text()
    plain, eca = "resnet18", "resnet18 attn_layer=eca"
    once = [f"validate {plain}", f"benchmark {plain}"]
    again = [f"benchmark {plain}", f"validate {eca}", f"benchmark {eca}"]
    assert calls.read_text().splitlines() == once + again
    assert (out / "results.csv").read_text().splitlines() == [
        VALIDATION,
        "resnet18,32,70.5,29.5,90.0,10.0,11.69,1.0,bilinear",
        "resnet18+eca,32,70.5,29.5,90.0,10.0,11.69,1.0,bilinear",
    ]
    assert (out / "benchmark-infer.csv").read_text().splitlines() == [
        "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count",
        "resnet18,32,100.0,10.0,1,11.7",
    ]
    assert "| resnet18 | 70.5 | 90.0 | 11.69 | 100.0 | 50.0 |" in (out / "table.md").read_text()


def test_ledger(benchmarks, tmp_path):
    run, _ = benchmarks
    path = tmp_path / "runs.jsonl"
    ledger = run.Ledger(path, {"epochs": "1"})
    ledger.add("resnet18", "validate", {"top1": 1.0})
    ledger.add("resnet18", "benchmark", {"error": "out of memory"})
    path.write_text(path.read_text() + '{"row": "resnet34", "st')  # a crash in the middle of a line
    again = run.Ledger(path, {"epochs": "1"})
    assert again.done == {("resnet18", "validate"): {"top1": 1.0}}
    again.add("resnet34", "validate", {"top1": 2.0})
    assert [json.loads(line).get("row") for line in path.read_text().splitlines()] == [None, "resnet18", "resnet34"]
    with pytest.raises(SystemExit, match="made with other settings"):
        run.Ledger(path, {"epochs": "2"})


@pytest.mark.parametrize(
    "arguments", [["--data", "x"], ["--pretrained", "--epochs", "1"], ["--pretrained", "--checkpoints", "x"]]
)
def test_weights_come_from_one_place(arguments, benchmarks, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmarks[0].parse(arguments)
    assert stop.value.code == 2
    assert "weights must come from one of" in capsys.readouterr().err


def test_model_list(benchmarks, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("resnet18\neca_resnet50\n\n")
    assert benchmarks[0].parse(["--model-list", str(tmp_path / "names.txt")]).models == ["resnet18", "eca_resnet50"]
    with pytest.raises(SystemExit):
        benchmarks[0].parse(["--model-list", str(tmp_path / "nowhere")])
    assert "nowhere is not a file" in capsys.readouterr().err


@needs_timms_scripts
class TestWithTimmsScripts:
    def test_digits(self, tmp_path):
        """Train, validate and measure one model; a second call has nothing to do."""
        arguments = ["--models", "resnet18", "--attn", "eca", "--epochs", "1", "--out", tmp_path / "out"]
        arguments += ["--benchmark-args=-b 8 --num-bench-iter 5 --num-warm-iter 1"]
        first = bench(*arguments, TIMM_SCRIPTS=REAL)
        assert first.returncode == 0, first.stderr
        assert "failed" not in first.stdout
        second = bench(*arguments, TIMM_SCRIPTS=REAL)
        assert (second.returncode, second.stdout) == (0, "")
        with open(tmp_path / "out" / "results.csv") as file:
            (row,) = csv.DictReader(file)
        assert row["model"] == "resnet18+eca"
        assert 0 < float(row["top1"]) <= 100
        for name in ("benchmark-infer.csv", "benchmark-train.csv"):
            assert len((tmp_path / "out" / name).read_text().splitlines()) == 2

    @pytest.mark.parametrize(
        ("name", "theirs"),
        [
            ("results.csv", "results-imagenet.csv"),
            ("benchmark-infer.csv", "benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv"),
            ("benchmark-train.csv", "benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"),
        ],
    )
    def test_columns_are_timms(self, name, theirs, benchmarks):
        file = REAL / "results" / theirs
        if not file.is_file():
            pytest.skip(f"this checkout has no results/{theirs}")
        header = file.read_text().splitlines()[0]
        assert benchmarks[1].COLUMNS[name].split() == header.split(",")

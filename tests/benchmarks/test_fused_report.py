import json
import re
import runpy
import sys

import pytest
import torch


def test_docs_are_made_from_the_results(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    report = runpy.run_path(str(repository / "benchmarks" / "fused_report.py"))
    text = (repository / "docs" / "fused.md").read_text()
    assert report["render"](text) == text
    for name in report["TABLES"]:
        assert f"<!-- {name} -->\n|" in text


def test_memory_as_committed(repository):
    mib = json.loads((repository / "benchmarks/results/memory.json").read_text())["mib_per_image"]
    for model, limit in {"resnet18": 1.005, "resnet50": 1.005, "resnet101": 1.005, "mobilenetv2_100": 1.01}.items():
        assert mib[model]["eca"] / mib[model]["plain"] <= limit < mib[model]["timm's eca"] / mib[model]["plain"]


def test_a_cell_of_speed(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    out = tmp_path / "speed.json"
    arguments = "--models resnet18 --modes training --batches 2 --layouts nchw --engines eager --size 32 --rounds 3"
    for extra in (["--processes", "2"], ["--tail", "--modes", "inference", "training"]):
        monkeypatch.setattr(sys, "argv", ["speed.py", *arguments.split(), "--out", str(out), *extra])
        runpy.run_path(str(repository / "benchmarks" / "speed.py"), run_name="__main__")
    cells = json.loads(out.read_text())["cells"]
    tails = ["resnet18 inference 2 nchw eager 32 pixels", "resnet18 training 2 nchw eager 32 pixels"]
    assert list(cells) == ["resnet18 training 2 nchw eager 32", *tails]
    assert all(figures["ratio"]["plain"]["median"] == 1 for figures in cells.values())
    assert [figures["ratio"]["eca"]["rounds"] for figures in cells.values()] == [6, 3, 3]
    assert all(cells[name]["bandwidth"].keys() == {"eca", "copy"} for name in tails)
    shown = capsys.readouterr().out
    assert "| resnet18 training 2 nchw eager 32 pixels |" in shown
    assert re.search(r"\| \d+\.\d of \d+\.\d \|$", shown, re.MULTILINE)


def test_bytes_that_a_tail_moves(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    tails = runpy.run_path(str(repository / "benchmarks" / "tails.py"))
    for name, inference, training in (("resnet18", {32}, {110}), ("mobilenetv2_100", {22, 32}, {80, 90})):
        found = [block for block, *_ in tails["distinct_tails"](name, 1, 32)]
        assert {tails["bytes_moved"](block, "inference", 1, 10) for block in found} == inference
        assert {tails["bytes_moved"](block, "training", 1, 10) for block in found} == training


def test_graph_of_a_tail(repository, monkeypatch):
    """It is called alone from the second time on, and computes what the tail does of other maps than the first."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    tails = runpy.run_path(str(repository / "benchmarks" / "tails.py"))
    block, shapes, _ = next(tails["distinct_tails"]("resnet18", 2, 32))
    tail = tails["TAILS"]["eca"]
    graph = tails["graph_of"](tails["in_place"](tail))
    with torch.no_grad():
        for _ in range(2):
            maps = tails["random_maps"](shapes, "cpu", torch.contiguous_format)
            expected = tail(block.eval(), *(given.clone() for given in maps))
            graph(block, *maps)
            torch.testing.assert_close(maps[:2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_to_measure_on(repository, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(repository / "benchmarks" / "speed.py"), run_name="__main__")
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_no_processes_to_measure_in(repository, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--processes", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(repository / "benchmarks" / "speed.py"), run_name="__main__")
    assert "--processes 0: at least 1 is needed" in capsys.readouterr().err


def test_growth(repository, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    out = tmp_path / "growth.json"
    runs = []
    for sizes in (["32"], ["32", "64"]):  # the second run goes on where the first ended
        arguments = ["--sizes", *sizes, "--depths", "18", "--rounds", "2", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
        runpy.run_path(str(repository / "benchmarks" / "growth.py"), run_name="__main__")
        runs.append(json.loads(out.read_text())["points"])
    first, points = runs
    assert set(points) == {"resnet50 32", "resnet50 64", "resnet18 224"}
    assert all(points[name] == figures for name, figures in first.items())
    assert points["resnet50 64"]["memory"]["eca"] < points["resnet50 64"]["memory"]["timm's eca"]
    assert out.with_suffix(".png").stat().st_size > 10_000

import json
import runpy
import statistics

import pytest
from PIL import Image


@pytest.fixture
def sweep(repository):
    return runpy.run_path(str(repository / "benchmarks" / "kernel_sweep.py"))["main"]


@pytest.fixture
def folder(tmp_path):
    """An image folder of two colours, which a network tells apart after few steps."""
    for split, count in (("train", 64), ("val", 8)):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            path = tmp_path / "data" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), colour).save(path / f"{index}.png")
    return tmp_path / "data"


def test_sweep(sweep, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--size", "32", "--models", "resnet10t", "--kernels", "3", "--epochs", "1"]
    arguments += ["--device", "cpu", "--out", str(out)]
    assert sweep([*arguments, "--seeds", "1"]) == 0
    first = json.loads((out / "results.json").read_text())
    assert first["settings"] == {"data": str(folder), "size": 32, "epochs": 1}
    assert list(first["runs"]) == [f"resnet10t {config} 0" for config in ("none", "SE", "3", "adaptive")]
    assert len({run["val_loss"][0] for run in first["runs"].values()}) == 4
    with Image.open(out / "kernel_sweep.png") as image:
        assert image.size == (825, 600)
    assert "resnet10t adaptive: " in capsys.readouterr().out

    assert sweep([*arguments, "--seeds", "2"]) == 0  # continues: the runs of the first seed stay as they are
    second = json.loads((out / "results.json").read_text())
    assert len(second["runs"]) == 8
    assert {name: second["runs"][name] for name in first["runs"]} == first["runs"]
    assert "2 seeds" in capsys.readouterr().out

    assert sweep([*arguments, "--epochs", "2"]) == 2  # other settings do not fit into the same figure
    assert "is not of a sweep with settings" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text()) == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "3", "4"], "--kernels must be odd and positive, got 4."),
        (["--models", "vgg11"], "--models must be ResNets of timm, got vgg11."),
        (["--seeds", "0"], "--seeds must be at least 1, got 0."),
        (["--data", "nowhere"], "--data must be a folder with train/ and val/, nowhere has no train/."),
        (["--out", "/proc/sweep"], "cannot write to /proc/sweep"),
    ],
)
def test_refuses(sweep, arguments, message, capsys):
    assert sweep(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_refuses_too_little_data(sweep, folder, tmp_path, capsys):
    for path in (folder / "train").glob("*/[1-9]*.png"):
        path.unlink()
    assert sweep(["--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "has 2 training images, less than one batch of 64." in capsys.readouterr().err
    for path in (folder / "train").glob("*/*.png"):
        path.unlink()
    assert sweep(["--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "Found 0 images" in capsys.readouterr().err


def test_recorded_sweep(repository):
    results = json.loads((repository / "benchmarks/results/kernel_sweep.json").read_text())
    assert results["settings"]["data"] == "digits"
    configs = ("none", "SE", "3", "5", "7", "9", "adaptive")
    assert set(results["runs"]) == {f"resnet18 {config} {seed}" for config in configs for seed in range(5)}
    tops = [[results["runs"][f"resnet18 {config} {seed}"]["top1"][-1] for seed in range(5)] for config in configs]
    readme = " ".join((repository / "README.md").read_text().split())
    means = [statistics.mean(values) for values in tops]
    assert f"between {min(means):.1f} % and {max(means):.1f} %, best without attention" in readme
    assert means.index(max(means)) == configs.index("none")
    assert f"spreads of up to {max(map(statistics.stdev, tops)):.1f}" in readme

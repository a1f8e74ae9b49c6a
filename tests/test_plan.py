import json

import pytest

from timm_eca.cli import main
from timm_eca.coverage import coverage_of


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_plan(capsys):
    assert main(["plan", "efficientnet_b0"]) == 0
    header, first, *rest = lines(capsys)
    assert header == ["path", "stage", "channels", "kernel", "mode", "replaces"]
    assert first == ["blocks.0.0.se", "1", "32", "3", "slot", "SqueezeExcite"]
    assert len(rest) == 15
    assert main(["plan", "efficientnet_b0", "--where", "add", "--attn", "cbam"]) == 0
    assert lines(capsys)[1] == ["blocks.0.0.attn_last", "1", "16", "1", "gate", "-"]
    assert main(["plan", "eca_resnet50"]) == 0
    assert lines(capsys)[1] == ["layer1.0.se", "1", "256", "3", "slot", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5"], "Unknown model (resnet5)"),
        (["vit_tiny_patch16_224"], "has no place for channel attention"),
        (["resnet50", "--attn", "ecaa"], "Did you mean 'eca'"),
        (["resnet50", "--where", "middle"], "attn_where must be one of"),
        (["local-dir:/nope"], "Config file not found: /nope/config.json"),
    ],
)
def test_plan_refuses(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_coverage(jobs, capsys, tmp_path):
    assert main(["coverage", "--filter", "resnet1*", "--jobs", jobs, "--out", str(tmp_path)]) == 0
    models = json.loads((tmp_path / "coverage.json").read_text())["models"]
    counts = {m["name"]: m["sites"] for m in models}
    assert (counts["resnet10t"], counts["resnet18"], counts["resnet101"]) == (4, 8, 33)
    assert f"{len(models)} of {len(models)} models take the layer" in capsys.readouterr().out
    table = (tmp_path / "coverage.md").read_text()
    resnets = sum(m["module"] == "resnet" for m in models)
    assert f"| resnet | {resnets} | {resnets} | 4 to 50 | BasicBlock `.se`<br>Bottleneck `.se` |" in table


@pytest.mark.parametrize("arguments", [["--filter", "nothing*"], ["--jobs", "0"]])
def test_coverage_refuses(arguments, capsys, tmp_path):
    assert main(["coverage", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "must match a model and --jobs be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_coverage_of_a_refusal():
    row = coverage_of("swin_tiny_patch4_window7_224")
    assert (row.sites, row.places) == (0, ())
    assert row.refusal.startswith("swin_tiny_patch4_window7_224 has no place")

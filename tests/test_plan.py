import json

import pytest

from timm_eca.cli import main
from timm_eca.coverage import check_place, coverage_of


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


def test_coverage_writes_nothing_unasked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["coverage", "--filter", "resnet18"]) == 0
    printed = capsys.readouterr().out
    assert "for 1 of the " in printed
    assert "| resnet | 1 | 1 | 8 | BasicBlock `.se` |" in printed
    assert not list(tmp_path.iterdir())


def test_coverage_replaces_its_own_tables_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_eca.coverage.timm_names", lambda: ["resnet18"])

    def run(*arguments):
        code = main(["coverage", "--out", str(tmp_path), *arguments])
        return code, capsys.readouterr().err.splitlines()[-1]

    table, data = tmp_path / "coverage.md", tmp_path / "coverage.json"
    (tmp_path / "thesis.tex").touch()
    assert [run()[0], run()[0]] == [0, 0]
    whole = data.read_text()
    refusal = "timm-eca: {} was not made by timm-eca coverage{}. Give another folder."
    assert run("--filter", "resnet*") == (2, refusal.format(table, " --filter resnet*"))
    table.write_text("# Coverage of my tests\n")
    assert run() == (2, refusal.format(table, ""))
    table.unlink()
    assert run()[0] == 0
    data.write_text('{"lines": 93}')
    assert run() == (2, refusal.format(table, ""))
    table.unlink()
    assert run() == (2, refusal.format(data, ""))
    assert data.read_text() == '{"lines": 93}'
    data.unlink()
    assert run()[0] == 0
    assert data.read_text() == whole


def test_the_committed_tables_can_be_made_anew(repository):
    check_place(repository / "docs")


@pytest.mark.parametrize("arguments", [["--filter", "nothing*"], ["--jobs", "0"]])
def test_coverage_refuses(arguments, capsys, tmp_path):
    assert main(["coverage", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert "must match a model and --jobs be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_coverage_of_a_refusal():
    row = coverage_of("swin_tiny_patch4_window7_224")
    assert (row.sites, row.places) == (0, ())
    assert row.refusal.startswith("swin_tiny_patch4_window7_224 has no place")

"""The launcher with a small script of the tests' own: arguments, exit codes, signals, workers, no shadowing."""

import importlib.util
import io
import json
import signal
import sys

import pytest
import timm

from small_checkout import make_checkout, run, start
from timm_eca.cli import main
from timm_eca.scripts import COMMANDS, borrowed, launch
from timm_eca.scripts.__main__ import main as module_main
from timm_eca.scripts.source import Script, distance_warning

PASSED = ["--model", "eca_resnet18", "--help", "-x=1", "--", "--timm-scripts", "kept", ""]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("TIMM_SCRIPTS", borrowed.FOLDER):
        monkeypatch.setenv(name, "")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the tests' own train.py and a `timm/` that must never be imported."""
    return make_checkout(tmp_path / "checkout")


@pytest.mark.parametrize("module", ["timm_eca.scripts", "timm_eca.cli"])
def test_inside_a_checkout(module, checkout):
    """The working folder is the checkout itself, where `-m` would find its timm/ first."""
    code, out, err = run("train", "--timm-scripts", ".", *PASSED, module=module, cwd=checkout, stdin="typed")
    assert code == 0, err
    told = json.loads(out)
    assert told["argv"] == [str(checkout / "train.py"), *PASSED]
    assert told["file"] == str(checkout / "train.py")
    assert told["stdin"] == "typed"
    assert told["timm"] == timm.__file__
    assert told["registered"]
    assert err == ""
    assert not list(checkout.rglob("__pycache__"))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(method, checkout):
    code, out, err = run("train", "workers", method, cwd=checkout, env={"TIMM_SCRIPTS": "."})
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["child"]
    # ResNet-18 has 11,689,512; in its two blocks per stage kernels (3, 5, 7, 7) add 44, adaptive (3, 5, 5, 5) add 36
    assert told["parameters"] == [11_689_556, 11_689_548]


@pytest.mark.parametrize(("given", "code"), [("0", 0), ("3", 3), ("a message", "a message")])
def test_exit_code(given, code, checkout):
    with pytest.raises(SystemExit) as stop:
        main(["train", f"--timm-scripts={checkout}", "exit", given])
    assert stop.value.code == code


def test_errors_of_the_script_pass(checkout):
    argv = sys.argv
    with pytest.raises(ZeroDivisionError, match="of the script"):
        main(["train", "--timm-scripts", str(checkout), "raise"])
    assert sys.argv is argv


def test_signals(checkout):
    """In the same process: a handler of the script's runs, and without one the signal ends it."""
    cases = [
        ("timm_eca.scripts", signal.SIGUSR1, 7),
        ("timm_eca.scripts", signal.SIGTERM, -signal.SIGTERM),
        ("timm_eca.cli", signal.SIGINT, -signal.SIGINT),
    ]
    env = {"TIMM_SCRIPTS": str(checkout)}
    processes = [start("train", "wait", module=module, env=env) for module, _, _ in cases]
    for process, (_, number, code) in zip(processes, cases):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code


def test_option_beats_environment(checkout, tmp_path, monkeypatch, capsys):
    other = make_checkout(tmp_path / "other")
    monkeypatch.setenv("TIMM_SCRIPTS", str(other))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["train", "--timm-scripts", str(checkout)]) == 0
    assert main(["train"]) == 0
    files = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()]
    assert files == [str(checkout / "train.py"), str(other / "train.py")]


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("timm-eca: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_folder_without_the_script(checkout, monkeypatch, capsys):
    message = refused(capsys, "validate", "--timm-scripts", checkout)
    assert f"--timm-scripts is {checkout}, where there is no validate.py" in message
    assert "git clone --depth 1 --branch v1.0." in message
    monkeypatch.setenv("TIMM_SCRIPTS", str(checkout / "nowhere"))
    assert "TIMM_SCRIPTS is" in refused(capsys, "onnx-export")
    assert "--timm-scripts needs a folder" in refused(capsys, "train", "--timm-scripts")


@pytest.mark.parametrize(
    ("script", "installed", "warns"),
    [
        ("1.0.28", "1.0.31", False),
        ("1.0.3", "1.1.0", False),
        ("1.1.0.dev0", "1.0.31", False),
        ("1.0.28", "1.2.0", True),
        ("0.9.16", "1.0.31", True),
        ("2.0.0", "1.0.31", True),
        (None, "1.0.31", False),
    ],
)
def test_distance(script, installed, warns, tmp_path):
    warning = distance_warning(Script(tmp_path / "train.py", script), installed)
    assert bool(warning) == warns
    if warns:
        assert f"of timm {script}, installed is timm {installed}" in warning


def test_a_far_version_warns_once(tmp_path, monkeypatch, capsys):
    checkout = make_checkout(tmp_path / "old", "0.9.16")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            launch.run_script("train", ["--timm-scripts", str(checkout), "exit", "0"])
    message = capsys.readouterr().err
    assert message.count("warning") == message.count("is of timm 0.9.16") == 1


def test_help_names_every_script(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        module_main(["tarin"])
    assert stop.value.code == 2
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


def test_missing_package(checkout, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name))
    (checkout / "inference.py").touch()
    message = refused(capsys, "inference", "--timm-scripts", checkout)
    assert message == "timm-eca: timm's inference needs pandas: pip install pandas\n"

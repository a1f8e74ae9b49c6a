import io
import os
import runpy
import sys
from importlib.metadata import version

import pytest

from timm_eca.cli import main


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"timm-eca {version('timm-eca')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: COMMAND"), (["dmeo"], "invalid choice: 'dmeo'"), (["demo", "--epochs", "x"], "invalid int value")],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("timm_eca.hub.check_folder", refuse)
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"timm-eca: [Errno 13] Permission denied: '{tmp_path}'\n"


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm_eca", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("timm_eca", run_name="__main__")
    assert (stop.value.code, capsys.readouterr().out) == (0, f"timm-eca {version('timm-eca')}\n")


def test_the_reader_goes_away(monkeypatch, capsys):
    """As `timm-eca plan resnet18 | head -1`; also what is left is written nowhere, without an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["plan", "resnet18"]) == 141
        stdout.flush()
    assert capsys.readouterr().err == ""


def test_a_console_without_the_letters_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr("timm_eca.hub.verify", lambda _: {"architecture": "net", "tensors": 3, "sha256": "0"})
    assert main(["verify", "café"]) == 0
    assert sys.stdout.buffer.getvalue() == b"caf\\xe9: intact. net, 3 tensors, sha256 0\n"

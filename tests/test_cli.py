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

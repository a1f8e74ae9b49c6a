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

import os

import pytest

from timm_eca.errors import CommandError
from timm_eca.outputs import whole_folder


def fill(out, text="new", made_by="test"):
    with whole_folder(out, made_by) as folder:
        (folder / "results.json").write_text(f'{{"made_by": "{made_by}"}}')
        (folder / "content").write_text(text)


def test_new_empty_and_own(tmp_path):
    out = tmp_path / "a" / "b"
    fill(out, "one")
    fill(out, "two")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert (out / "content").read_text() == "two"
    assert {p.name for p in out.parent.iterdir()} == {"b"}
    assert os.access(out, os.R_OK)


def test_of_another_command(tmp_path):
    fill(tmp_path / "out", made_by="other")
    with pytest.raises(CommandError, match="holds other files than those of test"):
        fill(tmp_path / "out")


def test_error_leaves_the_old_one(tmp_path):
    fill(tmp_path / "out", "old")

    def fail():
        with whole_folder(tmp_path / "out", "test") as folder:
            (folder / "content").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_full_disk(tmp_path):
    with pytest.raises(CommandError, match=r"cannot write to .*No space left"), whole_folder(tmp_path / "out", "test"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())

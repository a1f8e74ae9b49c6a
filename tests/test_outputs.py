import itertools
import os
import re
from pathlib import Path

import pytest

from timm_eca.errors import CommandError
from timm_eca.outputs import whole_folder

FILES = ("results.json", "content")


def fill(out, text="new", made_by="test"):
    with whole_folder(out, made_by, FILES) as folder:
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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_mode_of_a_new_folder(mask, mode, tmp_path, umask):
    umask(mask)
    fill(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == mode
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)


@pytest.mark.parametrize("mode", [0o700, 0o2775])
@pytest.mark.parametrize("empty", [True, False])
def test_mode_of_the_folder_that_is_replaced(mode, empty, tmp_path, umask):
    if empty:
        (tmp_path / "out").mkdir()
    else:
        fill(tmp_path / "out", "old")
    (tmp_path / "out").chmod(mode)
    fill(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == mode


def test_of_another_command(tmp_path):
    fill(tmp_path / "out", made_by="other")
    with pytest.raises(CommandError, match="holds other files than those of test"):
        fill(tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "content2", "photos/", "more/content", "content/results.json"])
def test_files_of_others(name, tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    if name.startswith("content/"):
        (out / "content").unlink()
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).mkdir() if name.endswith("/") else (out / name).touch()
    before = sorted(out.rglob("*"))
    message = f"holds other files than those of test, such as {name.rstrip('/')}. Give a new or empty folder."
    with pytest.raises(CommandError, match=re.escape(message)):
        fill(out)
    assert sorted(out.rglob("*")) == before


def test_a_linked_folder_is_of_others(tmp_path):
    fill(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "out" / "mine").symlink_to("../mine")
    with pytest.raises(CommandError, match="such as mine"):
        fill(tmp_path / "out")


def test_patterns(tmp_path):
    def fill_data():
        with whole_folder(tmp_path / "out", "test", ("results.json", "data/[0-9].png")) as folder:
            (folder / "data").mkdir()
            (folder / "data" / "1.png").touch()
            (folder / "results.json").write_text('{"made_by": "test"}')

    fill_data()
    fill_data()
    (tmp_path / "out" / "data" / "mine.png").touch()
    with pytest.raises(CommandError, match=r"such as data/mine\.png"):
        fill_data()


def test_files_that_come_during_the_run(tmp_path):
    out = tmp_path / "out"

    def fill_slowly():
        with whole_folder(out, "test", FILES):
            out.mkdir()
            (out / "notes.txt").touch()

    with pytest.raises(CommandError, match=f"^{out} holds other files than those of test"):
        fill_slowly()
    assert list(tmp_path.rglob("*")) == [out, out / "notes.txt"]


@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_swap_breaks_off(failing, error, tmp_path, monkeypatch):
    """The renames: straight to the place, the old folder away, the new one to its place."""
    fill(tmp_path / "out", "old")
    rename, calls = Path.rename, itertools.count(1)

    def broken(path, target):
        if next(calls) == failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(CommandError if error is OSError else error):
        fill(tmp_path / "out")
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_that_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    fill(tmp_path / "out", "old")
    rename, calls = Path.rename, itertools.count(1)

    def broken(path, target):
        if next(calls) != 2:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(CommandError, match="cannot write to"):
        fill(tmp_path / "out")
    assert [p.read_text() for p in tmp_path.glob(".out-old-*/out/content")] == ["old"]


def test_a_link(tmp_path):
    fill(tmp_path / "disk", "old")
    (tmp_path / "link").symlink_to("disk")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "content").read_text() == "new"


@pytest.mark.parametrize("out", [".", "/", "../work"])
def test_the_working_folder_and_mount_points(out, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(CommandError, match=r"is a mount point or the working folder\. Give a folder in it"):
        with whole_folder(Path(out), "test", FILES):
            pytest.fail("the run began")
    assert not list(tmp_path.glob("*/*"))


def test_error_leaves_the_old_one(tmp_path):
    fill(tmp_path / "out", "old")

    def fail():
        with whole_folder(tmp_path / "out", "test", FILES) as folder:
            (folder / "content").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_full_disk(tmp_path):
    with pytest.raises(CommandError, match=r"cannot write to .*No space left"):
        with whole_folder(tmp_path / "out", "test", FILES):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())

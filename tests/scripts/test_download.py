"""Downloads from a real server on the loopback, good and bad; the bytes are the tests' own, pinned for the test."""

import concurrent.futures
import hashlib
import http.server
import os
import socket
import threading

import pytest
import timm

from timm_eca.cli import main
from timm_eca.errors import CommandError
from timm_eca.scripts import borrowed, download, source
from timm_eca.scripts.pins import SHA256
from timm_eca.scripts.source import nearest_tag

SCRIPT = b"import sys\nprint('ran', sys.argv[1:])\n"
TAG = "v1.0.28"
CLONE = f"git clone --depth 1 --branch {TAG} https://github.com/huggingface/pytorch-image-models"


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with one status and body; `cut` bytes of the body are announced but not sent."""

    status, body, cut = 200, SCRIPT, 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        self.send_response(server.status)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body[: len(server.body) - server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.31")
    monkeypatch.setitem(SHA256[TAG], "train", hashlib.sha256(SCRIPT).hexdigest())
    for name in ("TIMM_SCRIPTS", borrowed.FOLDER):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TIMM_ECA_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        monkeypatch.setenv("TIMM_ECA_SCRIPTS_URL", f"http://127.0.0.1:{server.server_port}/raw")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cached(tmp_path):
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_downloads_once(server, tmp_path, capsys):
    for arguments in (["--epochs", "1"], []):
        assert main(["train", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == "ran ['--epochs', '1']\nran []\n"
    assert printed.err.count("downloaded train.py of timm v1.0.28") == 1
    assert server.asked == ["/raw/v1.0.28/train.py"]
    assert cached(tmp_path) == [tmp_path / "cache" / "scripts" / TAG / "train.py"]
    assert cached(tmp_path)[0].read_bytes() == SCRIPT


def test_a_mirror_in_a_folder(server, tmp_path, monkeypatch):
    (tmp_path / "mirror" / TAG).mkdir(parents=True)
    (tmp_path / "mirror" / TAG / "train.py").write_bytes(SCRIPT)
    monkeypatch.setenv("TIMM_ECA_SCRIPTS_URL", (tmp_path / "mirror").as_uri())
    assert download.cached_script("train", TAG).read_bytes() == SCRIPT
    assert server.asked == []


def test_a_shared_cache(server):
    assert download.cached_script("train", TAG).stat().st_mode & 0o777 == 0o644


def test_many_at_once(server, tmp_path):
    """As torchrun's processes on one machine ask: each gets the whole file."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: download.cached_script("train", TAG), range(8)))
    assert {path.read_bytes() for path in paths} == {SCRIPT}
    assert cached(tmp_path) == [paths[0]]


def test_changed_cache_is_fetched_again(server, tmp_path, capsys):
    assert main(["train"]) == 0
    cached(tmp_path)[0].write_bytes(b"print('forged')\n")
    assert main(["train"]) == 0
    assert "forged" not in capsys.readouterr().out
    assert len(server.asked) == 2
    server.status = 500  # a good cache needs no server
    assert main(["train"]) == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"cut": 5}, "the answer broke off, 5 bytes are missing"),
        ({"body": SCRIPT + b"#"}, f"it must be {hashlib.sha256(SCRIPT).hexdigest()}"),
        ({"status": 404}, "Not Found"),
        ({"status": 500}, "Internal Server Error"),
        ({"body": b""}, "its sha256 is"),
    ],
)
def test_faults(fault, reason, server, tmp_path, capsys):
    for name, value in fault.items():
        setattr(server, name, value)
    assert_refused(tmp_path, capsys, reason)


def assert_refused(tmp_path, capsys, reason):
    assert main(["train"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert reason in printed.err
    assert CLONE in printed.err
    assert cached(tmp_path) == []


def test_refused_connection(server, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TIMM_ECA_SCRIPTS_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert_refused(tmp_path, capsys, "Connection refused")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_without_the_script(option, server, capsys):
    server.status = 404
    assert main(["train", option]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: timm-eca train [--timm-scripts DIR] [arguments of timm's train.py]\n")
    assert "All arguments but --timm-scripts are the script's own" in printed.out
    assert CLONE in printed.err


@pytest.mark.parametrize("url", ["nonsense", "http://["])
def test_bad_address(url, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIMM_ECA_SCRIPTS_URL", url)
    assert_refused(tmp_path, capsys, f"cannot download {url}/{TAG}/train.py")


def test_silent_server(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("TIMM_ECA_SCRIPTS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert_refused(tmp_path, capsys, "timed out")


def test_unwritable_cache(server, tmp_path, capsys, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    assert main(["train"]) == 2
    assert "Name another cache folder with TIMM_ECA_CACHE" in capsys.readouterr().err
    assert (tmp_path / "cache").read_text() == "a file"


def test_an_interrupted_write_leaves_nothing(server, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.Path, "replace", fail)
    assert main(["train"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cached(tmp_path) == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TIMM_ECA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "timm_eca"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == download.Path(os.path.expanduser("~/.cache/timm_eca"))


@pytest.mark.parametrize(
    ("installed", "tag"),
    [
        ("1.0.28", "v1.0.28"),
        ("1.0.31", "v1.0.28"),
        ("1.0.27", "v1.0.27"),
        ("1.0.6", "v1.0.3"),
        ("2.3.0.dev0", "v1.0.28"),
    ],
)
def test_nearest_tag(installed, tag):
    assert nearest_tag("train", installed) == tag


def test_the_nearest_tag_that_has_the_script(monkeypatch):
    monkeypatch.setattr(source, "SHA256", {"v1.0.1": {"train": "a", "inference": "b"}, "v1.0.2": {"train": "c"}})
    assert nearest_tag("inference", "1.0.31") == "v1.0.1"
    with pytest.raises(CommandError, match=r"timm 1\.0\.0 is older than all releases whose train\.py is known: v1\.0"):
        nearest_tag("train", "1.0.0")


def test_pins():
    assert list(SHA256) == sorted(SHA256, key=lambda tag: [int(n) for n in tag[1:].split(".")])
    for sums in SHA256.values():
        assert sorted(sums) == ["avg_checkpoints", "benchmark", "inference", "onnx_export", "train", "validate"]
        assert all(len(bytes.fromhex(digest)) == 32 for digest in sums.values())

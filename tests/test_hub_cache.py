"""What leaves the Hub's cache and what stays: a damaged file goes, that very one, and nothing that was published so."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hub_store import git_blob

from timm_eca import hub
from timm_eca.cli import main
from timm_eca.errors import IntegrityError, WeightsError
from timm_eca.weights import check_folder

COMMIT, OTHER = "a" * 40, "b" * 40
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PUBLISHED = "It is as it was published: nothing was removed from the cache, and another download would not help"
REMOVED = "It was removed from the cache; try again"
TRANSFORMERS = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Cache:
    """A cache of 'lab/net', filled as the Hub's client does it."""

    def __init__(self, root):
        self.root, self.repo = root, root / "models--lab--net"

    def put(self, name, content, digest=git_blob, commit=COMMIT):
        """Store a file under a commit, in a blob named by its digest: git's of small files, sha256 of large ones."""
        blob, link = self.repo / "blobs" / digest(content), self.path(name, commit)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(f"../../blobs/{blob.name}")

    def path(self, name, commit=COMMIT):
        return self.repo / "snapshots" / commit / name

    def flip(self, name, commit=COMMIT):
        """Flip a bit; the file stays JSON if it is that."""
        path = self.path(name, commit)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"0.485", b"0.484") if name == CONFIG else content[:-1] + b"\xff")
        assert path.read_bytes() != content

    def files(self):
        return {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def load(self, commit=COMMIT):
        return hub.load(f"lab/net@{commit}", cache_dir=self.root)


@pytest.fixture
def config(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.fixture
def weights(folder):
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def small(cache, config, weights):
    """Weights that are in git itself, and so named by git's digest; the config records none."""
    cache.put(CONFIG, json.dumps({**config, "weights": None}).encode())
    cache.put(WEIGHTS, weights)
    return cache


class TestDamaged:
    def test_none(self, small, net):
        assert torch.equal(small.load().bn1.weight, net.bn1.weight)

    def test_weights(self, small):
        small.flip(WEIGHTS)
        with pytest.raises(IntegrityError, match=f"its git digest is .*, the Hub's name of the file says .* {REMOVED}"):
            small.load()
        kept = [path.relative_to(small.repo).parts[0] for path in small.files()]
        assert sorted(kept) == ["blobs", "snapshots"]  # the config's
        assert small.path(CONFIG).is_file()

    @pytest.mark.parametrize("digest", [git_blob, sha256])
    def test_config(self, digest, cache, config, weights):
        """In git, or, as any file may be, in LFS or Xet."""
        cache.put(CONFIG, json.dumps(config).encode(), digest)
        cache.put(WEIGHTS, weights, sha256)
        cache.flip(CONFIG)
        kind = "git digest" if digest is git_blob else "sha256"
        with pytest.raises(IntegrityError, match=f"{CONFIG} is not what it should be: its {kind} is .* {REMOVED}"):
            cache.load()
        assert not cache.path(CONFIG).is_symlink()
        assert cache.path(WEIGHTS).read_bytes() == weights

    def test_of_another_commit(self, cache, config, weights):
        """Commits that share a config share its blob."""
        text = json.dumps({**config, "weights": None}).encode()
        for commit, content in ((COMMIT, weights), (OTHER, weights[:-1] + b"\0")):
            cache.put(CONFIG, text, commit=commit)
            cache.put(WEIGHTS, content, sha256, commit)
        cache.flip(WEIGHTS, OTHER)
        with pytest.raises(IntegrityError, match=REMOVED):
            cache.load(OTHER)
        cache.load()

    def test_read_only(self, small, monkeypatch):
        def refuse(path, missing_ok=False):
            raise PermissionError(13, "Permission denied", str(path))

        small.flip(WEIGHTS)
        monkeypatch.setattr(Path, "unlink", refuse)
        message = r"git digest is .* cannot be removed from the cache \(Permission denied\): remove .*/blobs/\w{40}, or"
        with pytest.raises(IntegrityError, match=message):
            small.load()

    def test_where_there_are_no_links(self, cache, config, weights):
        """The client copies then, and nothing but the config's record tells."""
        cache.path(WEIGHTS).parent.mkdir(parents=True)
        cache.path(CONFIG).write_text(json.dumps(config))
        cache.path(WEIGHTS).write_bytes(weights[:-1] + b"\xff")
        with pytest.raises(IntegrityError, match=REMOVED):
            cache.load()
        assert list(cache.files()) == [cache.path(CONFIG)]


class TestPublishedSo:
    def refused(self, cache, message):
        before = cache.files()
        with pytest.raises(IntegrityError, match=message):
            cache.load()
        assert cache.files() == before

    def test_other_library(self, cache, weights, monkeypatch, capsys):
        cache.put(CONFIG, json.dumps(TRANSFORMERS).encode())
        cache.put(WEIGHTS, weights, sha256)
        self.refused(cache, f"it names no architecture, so this is no timm model. {PUBLISHED}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.root))
        assert main(["verify", f"lab/net@{COMMIT}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert len(cache.files()) == 4

    def test_config_of_other_weights(self, cache, config, weights):
        cache.put(CONFIG, json.dumps({**config, "weights": {"sha256": "0" * 64}}).encode())
        cache.put(WEIGHTS, weights, sha256)
        self.refused(cache, f"its sha256 is {sha256(weights)}, config.json says 0{{64}}. {PUBLISHED}")

    def test_no_weights(self, cache, config):
        content = b"\xff" * 1000
        cache.put(CONFIG, json.dumps({**config, "weights": {"sha256": sha256(content)}}).encode())
        cache.put(WEIGHTS, content, sha256)
        self.refused(cache, f"is no intact safetensors file: .* {PUBLISHED}")

    def test_no_json_and_no_name(self, cache):
        cache.path(CONFIG).parent.mkdir(parents=True)
        cache.path(CONFIG).write_text("{")
        self.refused(
            cache, r"is not valid JSON: .* Nothing was removed from the cache; if .*config.json is damaged, rem"
        )

    @pytest.mark.parametrize("recorded", [str.upper, str.lower])
    def test_digest_in_capitals(self, recorded, cache, config, weights):
        cache.put(CONFIG, json.dumps({**config, "weights": {"sha256": recorded(sha256(weights))}}).encode())
        cache.put(WEIGHTS, weights, lambda content: recorded(sha256(content)))
        cache.load()
        assert hub.verify(f"lab/net@{COMMIT}", cache_dir=cache.root)["sha256"] == sha256(weights)


def test_the_users_own_files_stay(cache, config, weights, tmp_path):
    """A snapshot of links to files elsewhere, whatever they hold."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / CONFIG).write_text(json.dumps({**config, "weights": {"sha256": "0" * 64}}))
    (mine / WEIGHTS).write_bytes(weights)
    cache.path(CONFIG).parent.mkdir(parents=True)
    for path in mine.iterdir():
        cache.path(path.name).symlink_to(path)
    with pytest.raises(IntegrityError, match=f"It lies outside the cache, at {mine / WEIGHTS}: nothing was removed"):
        cache.load()
    assert (mine / WEIGHTS).read_bytes() == cache.path(WEIGHTS).read_bytes() == weights


class TestUnreadable:
    def refused(self, folder, message, capsys, kind=WeightsError):
        with pytest.raises(kind, match=message):
            check_folder(folder)
        assert main(["verify", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("timm-eca: ")
        assert error.count("\n") == 1

    def test_nested_config(self, tmp_path, capsys):
        (tmp_path / CONFIG).write_text("[" * 200_000)
        self.refused(tmp_path, "is nested too deeply", capsys, IntegrityError)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    @pytest.mark.parametrize("recorded", [True, False])
    def test_pointer(self, name, recorded, config, weights, tmp_path, capsys):
        """What a clone has without git-lfs."""
        (tmp_path / CONFIG).write_text(json.dumps(config if recorded else {**config, "weights": None}))
        (tmp_path / WEIGHTS).write_bytes(weights)
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        self.refused(tmp_path, f"{name} is git-lfs's pointer to the file, .*: run git lfs pull", capsys, IntegrityError)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_file_of_another_user(self, name, config, weights, tmp_path, capsys, monkeypatch):
        def refuse(path, *args, **kwargs):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *args, **kwargs)

        (tmp_path / CONFIG).write_text(json.dumps(config))
        (tmp_path / WEIGHTS).write_bytes(weights)
        opened = Path.open
        monkeypatch.setattr(Path, "open", refuse)
        self.refused(tmp_path, f"^{tmp_path / name} cannot be read: Permission denied.$", capsys)

"""Small weights that are in git itself, and so named in the cache by git's digest; the config records none."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from timm_eca import hub
from timm_eca.errors import IntegrityError

COMMIT = "a" * 40


@pytest.fixture
def cache(folder, tmp_path):
    repo = tmp_path / "cache" / "models--lab--net"
    snapshot = repo / "snapshots" / COMMIT
    for path in (snapshot, repo / "blobs"):
        path.mkdir(parents=True)
    config = {**json.loads((folder / "config.json").read_text()), "weights": None}
    weights = (folder / "model.safetensors").read_bytes()
    for name, content in (("config.json", json.dumps(config).encode()), ("model.safetensors", weights)):
        blob = repo / "blobs" / hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    return tmp_path / "cache"


def load(cache):
    return hub.load(f"lab/net@{COMMIT}", cache_dir=cache)


def damage(cache):
    path = cache / "models--lab--net" / "snapshots" / COMMIT / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_intact(cache, net):
    assert torch.equal(load(cache).bn1.weight, net.bn1.weight)


def test_damaged(cache):
    damage(cache)
    message = "its git digest is .*, the Hub's name of the file says .* It was removed from the cache; try again"
    with pytest.raises(IntegrityError, match=message):
        load(cache)
    assert not [path for path in cache.rglob("*") if not path.is_dir()]


def test_damaged_and_read_only(cache, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    damage(cache)
    monkeypatch.setattr(Path, "unlink", refuse)
    message = r"git digest is .* cannot be removed from the cache \(Permission denied\): remove .*/blobs/\w{40}, or use"
    with pytest.raises(IntegrityError, match=message):
        load(cache)

"""The test server itself: what a careless client would get away with elsewhere, it refuses."""

import base64
import hashlib
import json
import struct
import urllib.error
import urllib.request

import pytest
from hub_server import READER, WRITER
from hub_store import Repo
from hub_xet import BOOKEND, SHARD_TAG, WITH_METADATA, hex_of

SHA = hashlib.sha256(b"weights").hexdigest()
HEADER = {"key": "header", "value": {"summary": "x"}}


def lfs_file(oid, size):
    return {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": oid, "size": size}}


def small_file(path):
    content = base64.b64encode(b"x").decode()
    return {"key": "file", "value": {"path": path, "encoding": "base64", "content": content}}


def lines(*operations):
    return "\n".join(map(json.dumps, operations)).encode()


def shard(sha256):
    """One file that is made of nothing, with a sha256 that it claims."""
    raw = struct.pack("<4Q", *(int(sha256[i : i + 16], 16) for i in range(0, 64, 16)))
    assert hex_of(raw) == sha256
    entry = struct.pack("<32sII8x", b"f" * 32, WITH_METADATA, 0) + raw.ljust(48, b"\0")
    return SHARD_TAG.ljust(48, b"\0") + entry + BOOKEND.ljust(48, b"\0")


XORB = bytes([0, 3, 0, 0, 0, 3, 0, 0]) + b"abc"
COMMIT, LFS = "/api/models/lab/net/commit/main", "/lfs/lab/net"
REQUESTS = [
    (401, "POST", "/api/repos/create", b"{}", None),
    (403, "POST", "/api/repos/create", b"{}", READER),
    (401, "POST", COMMIT, lines(HEADER), None),
    (401, "POST", COMMIT, lines(HEADER), "hf_made_up"),
    (403, "POST", COMMIT, lines(HEADER), READER),
    (400, "POST", COMMIT, lines(lfs_file(SHA, 7)), WRITER),
    (400, "POST", COMMIT, lines(HEADER, lfs_file(SHA, 7)), WRITER),
    (400, "POST", COMMIT, lines(HEADER, small_file("model.safetensors")), WRITER),
    (404, "POST", "/api/models/lab/net/commit/none", lines(HEADER, small_file("a.txt")), WRITER),
    (412, "POST", COMMIT, lines({"key": "header", "value": {"summary": "x", "parentCommit": "0" * 40}}), WRITER),
    (200, "POST", COMMIT, lines(HEADER, small_file("a.txt")), WRITER),
    (400, "PUT", f"{LFS}/{SHA}", b"other weights", None),
    (404, "POST", f"{LFS}/verify", json.dumps({"oid": SHA, "size": 7}).encode(), WRITER),
    (200, "PUT", f"{LFS}/{SHA}", b"weights", None),
    (401, "GET", "/api/models/lab/net/xet-write-token/main", None, None),
    (403, "GET", "/api/models/lab/net/xet-write-token/main", None, READER),
    (401, "POST", f"/xet/v1/xorbs/default/{SHA}", XORB, "xet_read"),
    (400, "POST", f"/xet/v1/xorbs/default/{SHA}", XORB[:-1], "xet_write"),
    (200, "POST", f"/xet/v1/xorbs/default/{SHA}", XORB, "xet_write"),
    (401, "POST", "/xet/v1/shards", shard(SHA), WRITER),
    (400, "POST", "/xet/v1/shards", shard(SHA), "xet_write"),
    (200, "POST", "/xet/v1/shards", shard(hashlib.sha256(b"").hexdigest()), "xet_write"),
    (404, "GET", f"/xet/v1/reconstructions/{SHA}", None, "xet_read"),
]


@pytest.mark.parametrize(("status", "method", "path", "body", "token"), REQUESTS)
def test_status(status, method, path, body, token, server):
    server.repos["lab/net"] = Repo()
    first = server.repos["lab/net"].commit("main", {})
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(server.url + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as response:
            answered = response.status
    except urllib.error.HTTPError as error:
        answered = error.code
    assert answered == status
    assert (server.repos["lab/net"].refs["main"] == first) == (path != COMMIT or status != 200)
    assert server.objects.keys() <= {SHA, hashlib.sha256(b"").hexdigest()} or status == 200

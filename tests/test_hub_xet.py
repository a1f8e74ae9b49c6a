"""The same over hf_xet, which huggingface_hub takes by default: the server stores xorbs and shards."""

import json

from hub_client import digest
from hub_server import WRITER


def test_push_then_load(server, client, folder, net):
    server.fault("POST", "/xet/v1/xorbs/", "reset")
    server.fault("GET", "/xorbs/", 503)
    pushed = client(xet=True).run(
        f"""
attempt("push", lambda: hub.push({str(folder)!r}, "lab/net"), str)
attempt("again", lambda: hub.push({str(folder)!r}, "lab/net"), str)
attempt("pull request", lambda: hub.push(net(1), "lab/net", create_pr=True), str)
results["digest"] = digest(net(1))
""",
        HF_TOKEN=WRITER,
    )
    assert (
        pushed["push"]
        == pushed["again"]
        == ["ok", f"{server.url}/lab/net/commit/{server.repos['lab/net'].refs['main']}"]
    )
    assert pushed["pull request"] == ["ok", f"{server.url}/lab/net/discussions/1"]
    assert not [path for _, path, _ in server.log if "/lfs/" in path]
    recorded = json.loads(server.files("lab/net")["config.json"])["weights"]["sha256"]
    assert recorded in server.xet.hash_of

    server.log.clear()
    reader = client(xet=True)
    found = reader.run(
        """
attempt("load", lambda: hub.load("lab/net"))
attempt("warm", lambda: hub.load("lab/net"))
attempt("pull request", lambda: hub.load("lab/net@refs/pr/1"))
attempt("verify", lambda: hub.verify("lab/net"), lambda found: found["sha256"])
"""
    )
    assert found["load"] == found["warm"] == ["ok", digest(net)]
    assert found["pull request"] == ["ok", pushed["digest"]]
    assert found["verify"] == ["ok", recorded]
    assert any("/v1/reconstructions/" in path for _, path, _ in server.log)
    assert not [path for _, path, _ in server.log if path.startswith("/cdn/")]


def test_damage(server, client, folder, net):
    """On the way and on the disk, where all repositories share one blob."""
    client(xet=True).run(
        f"""
attempt("push", lambda: hub.push({str(folder)!r}, "lab/net"), str)
attempt("push", lambda: hub.push({str(folder)!r}, "lab/copy"), str)
""",
        HF_TOKEN=WRITER,
    )
    server.fault("GET", "/xorbs/", "flip", times=-1)
    reader = client(xet=True)
    found = reader.run('attempt("flipped on the way", lambda: hub.load("lab/net"))')
    assert found["flipped on the way"][0] == "IntegrityError"
    server.faults.clear()
    found = reader.again().run(
        """
attempt("then whole", lambda: hub.load("lab/net"))
attempt("copy", lambda: hub.load("lab/copy"))
blob, = {path.resolve() for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("model.safetensors")}
content = bytearray(blob.read_bytes())
content[-1] ^= 1
blob.chmod(0o644)
blob.write_bytes(content)
for name in ("net", "copy"):
    attempt(f"{name} flipped", lambda: hub.load(f"lab/{name}"))
    attempt(f"{name} again", lambda: hub.load(f"lab/{name}"))
"""
    )
    good = ["ok", digest(net)]
    for name in ("then whole", "copy", "net again", "copy again"):
        assert found[name] == good, (name, found[name])
    assert found["net flipped"][0] == "IntegrityError"
    assert found["copy flipped"] == good  # the shared blob went with the first

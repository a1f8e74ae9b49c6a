"""Loading from a real HTTP server: what the user sees when something fails, and what stays in the cache."""

import hashlib
import json

from hub_client import blobs, digest
from hub_server import READER, WRITER

from timm_eca import hub as timm_eca_hub

NET = "eca_mobilenetv2_050"
PUBLISHED = f"{NET}.ecanet_in1k"
CONFLICT = "Client error '409 Conflict'"
LOAD = 'attempt("load", lambda: hub.load("lab/net"))'


def recorded(folder):
    return json.loads((folder / "config.json").read_text())["weights"]["sha256"]


def check_cache(home, folder):
    """Nothing half-written and nothing damaged is in a cache."""
    weights = (folder / "model.safetensors").read_bytes()
    for path in blobs(home):
        if len(path.name) == 64:
            assert path.read_bytes() == weights, path


class TestWhoMayRead:
    def test_each(self, server, client, folder, net):
        server.put("lab/private", folder, private=True)
        server.put("lab/gated", folder, gated=True)
        found = client().run(
            f"""
attempt("private", lambda: hub.load("lab/private"))
attempt("invalid token", lambda: hub.load("lab/private", token="hf_wrong"))
attempt("private with token", lambda: hub.load("lab/private", token="{READER}"))
attempt("gated", lambda: hub.load("lab/gated", token="{READER}"))
attempt("gated and granted", lambda: hub.load("lab/gated", token="{WRITER}"))
attempt("missing", lambda: hub.load("lab/missing"))
attempt("no revision", lambda: hub.load("lab/gated@none", token="{WRITER}"))
attempt("no name", lambda: hub.load("whole/too/long"))
attempt("no folder", lambda: hub.load("./weights"))
"""
        )
        good = ["ok", digest(net)]
        assert found["private with token"] == found["gated and granted"] == good
        for name in ("private", "missing"):
            assert found[name] == [
                "MissingWeightsError",
                f"lab/{name} on {server.url} does not exist, or is private and HF_TOKEN or hf auth login is needed.",
            ]
        assert found["invalid token"][0] in ("WeightsError", "MissingWeightsError")
        assert found["gated"] == [
            "WeightsError",
            f"lab/gated on {server.url} is gated: ask for access on its page, then log in (hf auth login, or"
            " HF_TOKEN). The Hub says: Access to model lab/gated is restricted.",
        ]
        assert found["no revision"] == ["MissingWeightsError", f"lab/gated@none on {server.url} has no such revision."]
        assert found["no name"][0] == "ValueError"
        assert found["no folder"] == ["ValueError", "There is no folder ./weights."]


class TestRefused:
    STATUSES = (400, 401, 403, 404, 409, 412, 416, 422, 429)

    def test_each(self, server, client, folder):
        """An answer is no lack of one, and its reason is shown."""
        for status in self.STATUSES:
            server.put(f"lab/net{status}", folder)
            server.fault("HEAD", f"lab/net{status}/", status, times=-1)
        found = client().run(f"for s in {self.STATUSES}: attempt(str(s), lambda: hub.load(f'lab/net{{s}}'))")
        for status in self.STATUSES:
            kind, message = found[str(status)]
            assert kind in ("WeightsError", "MissingWeightsError")
            assert "planted" in message
            assert "not in the cache" not in message
            assert "\n" not in message
            assert message.count("http") == 1  # the Hub's own address, not the request's, nor the client's manual
        assert found["409"][1] == f"config.json of lab/net409 on {server.url}: HfHubHTTPError: {CONFLICT} planted"

    def test_password_in_the_endpoint(self, server, client, folder):
        server.put("lab/net", folder)
        client_ = client()
        url = server.url.replace("://", "://me:s3cret@")
        online = client_.start(LOAD, HF_ENDPOINT=url)
        offline = client_.again().start(LOAD, HF_ENDPOINT=url, HF_HUB_OFFLINE="1")
        for found in (online.results(), offline.results()):
            kind, message = found["load"]
            assert kind == "WeightsError"
            assert "s3cret" not in message
            assert f"lab/net on {server.url.replace('://', '://***@')}" in message


class TestFaults:
    def scenario(self, server, folder):
        for name in ("whole", "cut-once", "no-weights", "config-flip"):
            server.put(f"lab/{name}", folder)
        commit = server.repos["lab/no-weights"].commits
        commit[server.repos["lab/no-weights"].refs["main"]].pop("model.safetensors")
        server.fault("GET", "lab/config-flip/resolve", "flip")
        other = server.put("lab/other-library", folder)
        config = server.store("config.json", b'{"model_type": "vit"}')
        server.repos["lab/other-library"].commits[other]["config.json"] = config
        faults = {"500": 500, "503": 503, "reset": "reset", "truncated": "truncate", "flip": "flip"}
        for often, times in (("once", 1), ("always", -1)):
            for name, kind in faults.items():
                server.put(f"lab/{name}-{often}", folder)
                server.fault("GET", f"for=lab/{name}-{often}", kind, times)
            server.put(f"lab/head-503-{often}", folder)
            server.fault("HEAD", f"lab/head-503-{often}/", 503, times)

    def test_each(self, server, client, folder, net):
        self.scenario(server, folder)
        reader = client()
        found = reader.run(
            """
names = [f"{name}-{often}" for name in ("500", "503", "head-503", "reset", "truncated", "flip")
    for often in ("once", "always")] + ["whole", "no-weights", "config-flip", "other-library"]
for name in names:
    attempt(name, lambda: hub.load(f"lab/{name}"))
for name in ("flip-once", "config-flip"):
    attempt(f"{name} again", lambda: hub.load(f"lab/{name}"))
"""
        )
        good = ["ok", digest(net)]
        for name in ("500", "503", "head-503", "reset", "truncated"):
            assert found[f"{name}-once"] == good, name
        for name in ("whole", "flip-once again", "config-flip again"):
            assert found[name] == good, name
        resumed = [h.get("Range") for path, h in server.headers if "for=lab/reset-" in path or "for=lab/trunc" in path]
        assert [r for r in resumed if r], "no download was resumed"
        for name in ("500", "503", "reset", "truncated"):
            kind, message = found[f"{name}-always"]
            assert (kind, message.count("\n")) == ("WeightsError", 0)
            assert message.startswith(f"model.safetensors of lab/{name}-always on {server.url}: ")
        assert "503" in found["503-always"][1]
        assert (
            "the Hub is offline or cannot be reached: HfHubHTTPError: Server error '503" in found["head-503-always"][1]
        )
        for name in ("flip-once", "flip-always"):
            kind, message = found[name]
            assert kind == "IntegrityError"
            assert f"config.json says {recorded(folder)}. It was removed from the cache; try again." in message
            assert message.count("its sha256 is") == 1
        assert found["config-flip"][0] == "IntegrityError"
        assert "its git digest is" in found["config-flip"][1]
        assert found["no-weights"] == [
            "MissingWeightsError",
            f"lab/no-weights on {server.url} has no model.safetensors.",
        ]
        assert "so this is no timm model. It is as it was published" in found["other-library"][1]
        assert not [path for _, path, _ in server.log if "other-library" in path and "model.safetensors" in path]
        check_cache(reader.home, folder)
        for name in ("flip", "reset", "truncated", "500"):
            assert not list((reader.home / "hub" / f"models--lab--{name}-always").rglob("model.safetensors")), name

    def test_killed_on_the_way(self, server, client, folder, net):
        server.put("lab/net", folder)
        server.fault("GET", "/cdn/", "stall")
        reader = client().start(LOAD)
        reader.kill_when(lambda: any("/cdn/" in path for _, path, _ in server.log))
        check_cache(reader.home, folder)
        assert not list(reader.home.rglob("model.safetensors"))
        assert reader.again().run(LOAD)["load"] == ["ok", digest(net)]

    def test_damaged_in_the_cache(self, server, client, folder, net):
        """A bit that flips on the disk after the download; also where the config records no digest."""
        config = json.loads((folder / "config.json").read_text())
        del config["weights"]
        server.put("lab/net", folder)
        repo = server.repos["lab/net"]
        plain = {
            **repo.commits[repo.refs["main"]],
            "config.json": server.store("config.json", json.dumps(config).encode()),
        }
        repo.commit("plain", plain)
        found = client().run(
            """
def flip():
    for path in Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("blobs/*"):
        if len(path.name) == 64:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
for name in ("lab/net", "lab/net@plain"):
    for step in ("", " flipped", " again"):
        attempt(name + step, lambda: hub.load(name))
        if not step:
            flip()
attempt("verify", lambda: hub.verify("lab/net@plain"), str)
attempt("still there", lambda: hub.load("lab/net@plain", token=False))
"""
        )
        good = ["ok", digest(net)]
        for name in ("lab/net", "lab/net@plain"):
            assert found[name] == found[f"{name} again"] == good
            assert found[f"{name} flipped"][0] == "IntegrityError"
        assert found["verify"] == [
            "IntegrityError",
            "lab/net@plain records no sha256 of its weights: nothing tells whether they are intact.",
        ]
        assert found["still there"] == good

    def test_damaged_before_it_was_committed(self, server, client, net, tmp_path):
        """A digest that fits bytes that are no safetensors file, and a file cut short after its digest was taken."""
        for name in ("garbage", "cut"):
            out = timm_eca_hub.save(net, tmp_path / name)
            whole = (out / "model.safetensors").read_bytes()
            content = b"\xff" * 1000 if name == "garbage" else whole[: len(whole) // 2]
            (out / "model.safetensors").write_bytes(content)
            if name == "garbage":
                config = json.loads((out / "config.json").read_text())
                config["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
                (out / "config.json").write_text(json.dumps(config))
            server.put(f"lab/{name}", out)
        found = client().run(
            """
for name in ("garbage", "cut"):
    attempt(name, lambda: hub.load(f"lab/{name}"))
    attempt(name + " pushed", lambda: hub.push(Path(FOLDER) / name, "lab/other"), str)
""".replace("FOLDER", repr(str(tmp_path))),
            HF_TOKEN=WRITER,
        )
        assert found["garbage"][0] == found["cut"][0] == "IntegrityError"
        assert "no intact safetensors file" in found["garbage"][1]
        assert found["garbage pushed"][0] == found["cut pushed"][0] == "IntegrityError"
        assert "lab/other" not in server.repos


def test_server_down_and_offline(server, client, folder, net):
    server.put("lab/net", folder)
    warm = client()
    assert warm.run(LOAD)["load"] == ["ok", digest(net)]
    server.stop()
    code = """
attempt("warm", lambda: hub.load("lab/net"))
attempt("cold", lambda: hub.load("lab/net", cache_dir="empty"))
attempt("verify", lambda: hub.verify("lab/net"), lambda found: found["sha256"])
attempt("push", lambda: hub.push(net(1), "lab/net"), str)
"""
    down = warm.start(code, HF_TOKEN=WRITER)
    offline = warm.again().start(code, HF_HUB_OFFLINE="1", HF_TOKEN=WRITER)
    for found in (down.results(), offline.results()):
        assert found["warm"] == ["ok", digest(net)]
        assert found["verify"] == ["ok", recorded(folder)]
        assert found["cold"][0] == "WeightsError"
        assert "is not in the cache, and the Hub is offline or cannot be reached" in found["cold"][1]
        assert found["push"][0] == "WeightsError"
        assert found["push"][1].startswith(f"the upload of lab/net on {server.url}: ")
    assert ": the Hub is offline or cannot be reached" in found["push"][1]


def test_two_at_once(server, client, folder, net):
    server.put("lab/net", folder)
    one = client()
    both = [one.start(LOAD), one.again().start(LOAD)]
    assert [process.results()["load"] for process in both] == [["ok", digest(net)]] * 2
    check_cache(one.home, folder)


def test_verify_on_the_console(server, client, folder):
    server.put("lab/net", folder)
    reader = client()
    code, output, progress = reader.command("verify", "lab/net", TQDM_POSITION="-1")  # bars without a terminal too
    assert (code, output) == (0, f"lab/net: intact. {NET}, 331 tensors, sha256 {recorded(folder)}\n")
    assert "model.safetensors: 100%" in progress  # huggingface_hub's own bars
    assert reader.command("verify", "lab/net", HF_HUB_OFFLINE="1")[:2] == (0, output)
    code, output, error = reader.command("verify", "lab/none")
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"timm-eca: lab/none on {server.url} does not exist, or is private")

"""Publishing and loading against a real HTTP server, by clients in processes of their own with fresh caches."""

import json
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
from hub_server import READER, WRITER, Hub

from conftest import randomize_
from timm_eca import hub as timm_eca_hub

NET = "eca_mobilenetv2_050"
PUBLISHED = f"{NET}.ecanet_in1k"
# Waiting between the client's retries is not what is tested; with its chunks of 10 MB a small file is never resumed.
PRELUDE = """
import hashlib, json, sys, time
from pathlib import Path
nap, time.sleep = time.sleep, lambda seconds: nap(min(seconds, 0.05))
import huggingface_hub, timm, torch, timm_eca
from timm_eca import hub
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
torch.set_num_threads(1)
results = {}
def digest(model):
    tensors = model.state_dict().values()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
def attempt(name, call, shown=digest):
    try:
        results[name] = ["ok", shown(call())]
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
def net(seed, classes=4):
    torch.manual_seed(seed)
    return timm.create_model("eca_mobilenetv2_050", num_classes=classes)
"""
EPILOGUE = "\nPath('RESULTS').write_text(json.dumps(results))\n"


def digest(model):
    import hashlib

    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()


class Client:
    """One process with its own HF_HOME."""

    def __init__(self, url, home):
        self.home = home
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TIMM_ECA"))}
        self.env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        self.env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(self, code, **env):
        self.cwd = self.home.parent / f"cwd-{time.monotonic_ns()}"
        self.cwd.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code + EPILOGUE],
            cwd=self.cwd,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def results(self):
        try:
            self.output, _ = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, self.output
        return json.loads((self.cwd / "RESULTS").read_text())

    def run(self, code, **env):
        return self.start(code, **env).results()


@pytest.fixture
def server():
    with Hub() as hub:
        yield hub


@pytest.fixture
def client(server, tmp_path):
    homes = iter(range(100))
    return lambda: Client(server.url, tmp_path / f"home-{next(homes)}")


@pytest.fixture(scope="session")
def net():
    torch.manual_seed(0)
    return randomize_(timm.create_model(NET))


@pytest.fixture(scope="session")
def folder(net, tmp_path_factory):
    return timm_eca_hub.save(net, tmp_path_factory.mktemp("saved") / PUBLISHED)


def blobs(home):
    return sorted(p for p in home.rglob("blobs/*") if p.is_file())


def test_push_then_load(server, client):
    pushed = client().run(
        """
push = lambda seed, **kwargs: hub.push(net(seed), "lab/net", **kwargs)
attempt("anonymous", lambda: push(1, token=False), str)
attempt("reader", lambda: push(1, token="hf_reader"), str)
attempt("first", lambda: push(1, private=True), str)
attempt("second", lambda: push(2), str)
attempt("nothing new", lambda: push(2), str)
attempt("pull request", lambda: push(3, create_pr=True), str)
attempt("no branch", lambda: push(3, revision="dev"), str)
attempt("bad name", lambda: push(3) if hub.push(net(3), "lab") else None, str)
results["digests"] = [digest(net(seed)) for seed in (1, 2, 3)]
""",
        HF_TOKEN=WRITER,
    )
    repo = server.repos["lab/net"]
    assert pushed["anonymous"][0] == "WeightsError"
    assert "401" in pushed["anonymous"][1]
    assert "write token" in pushed["reader"][1]
    assert repo.private
    assert [pushed[k][0] for k in ("first", "second", "nothing new", "pull request")] == ["ok"] * 4
    assert "/discussions/1" in pushed["pull request"][1]
    assert pushed["no branch"] == ["MissingWeightsError", f"lab/net on {server.url} has no such revision."]
    assert pushed["bad name"][0] == "ValueError"
    assert len(repo.commits) == 4  # the empty one, two pushes, one pull request
    first, second = list(repo.commits)[1:3]
    assert repo.refs["main"] == second
    assert sorted(server.files("lab/net")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert not [path for commit in repo.commits.values() for path in commit if path.endswith((".bin", ".pth"))]

    loaded = client().run(
        f"""
attempt("anonymous", lambda: hub.load("lab/net", token=False))
attempt("main", lambda: hub.load("lab/net"))
attempt("first", lambda: hub.load("lab/net@{first}"))
attempt("pull request", lambda: hub.load("lab/net@refs/pr/1"))
attempt("through timm", lambda: timm.create_model("hf-hub:lab/net", pretrained=True))
attempt("verify", lambda: hub.verify("lab/net"), lambda found: found["architecture"])
model = hub.load("lab/net", num_classes=7)
results["classes"] = [model.num_classes, model.pretrained_cfg["hf_hub_id"]]
""",
        HF_TOKEN=READER,
    )
    one, two, three = pushed["digests"]
    assert loaded["anonymous"][0] == "MissingWeightsError"
    assert "does not exist, or is private" in loaded["anonymous"][1]
    assert loaded["main"] == loaded["through timm"] == ["ok", two]
    assert loaded["first"] == ["ok", one]
    assert loaded["pull request"] == ["ok", three]
    assert loaded["verify"] == ["ok", NET]
    assert loaded["classes"] == [7, "lab/net"]


def test_the_authors_card_stays(server, client, folder):
    server.put("lab/net", folder)
    files = server.repos["lab/net"].commits[server.repos["lab/net"].refs["main"]]
    files["README.md"] = server.store("README.md", b"---\nlicense: mit\n---\nby hand\n")
    found = client().run('attempt("push", lambda: hub.push(net(1), "lab/net"), str)', HF_TOKEN=WRITER)
    assert found["push"][0] == "ok"
    assert server.files("lab/net")["README.md"].endswith(b"by hand\n")
    assert len(server.repos["lab/net"].commits) == 2


class TestFaultsWhileLoading:
    def scenario(self, server, folder):
        for name in ("whole", "once-500", "once-503", "always-500", "reset", "truncated", "flip-once", "flip-always"):
            server.put(f"lab/{name}", folder)
        server.put("lab/gated", folder, gated=True)
        server.put("lab/no-weights", folder)
        commit = server.repos["lab/no-weights"].commits
        commit[server.repos["lab/no-weights"].refs["main"]].pop("model.safetensors")
        server.put("lab/config-flip", folder)
        server.fault("HEAD", "lab/once-500", 500)
        server.fault("GET", "for=lab/once-503", 503)
        server.fault("GET", "for=lab/always-500", 500, times=-1)
        server.fault("GET", "for=lab/reset", "reset")
        server.fault("GET", "for=lab/truncated", "truncate")
        server.fault("GET", "for=lab/flip-once", "flip")
        server.fault("GET", "for=lab/flip-always", "flip", times=-1)
        server.fault("GET", "lab/config-flip/resolve", "flip")

    def test_each(self, server, client, folder, net):
        self.scenario(server, folder)
        reader = client()
        found = reader.run(
            """
names = ["whole", "once-500", "once-503", "always-500", "reset", "truncated", "flip-once", "flip-always",
    "gated", "no-weights", "missing", "config-flip", "whole@no-such", "whole/too/long"]
for name in names:
    attempt(name, lambda: hub.load(f"lab/{name}"))
for name in ("flip-once", "config-flip"):
    attempt(f"{name} again", lambda: hub.load(f"lab/{name}"))
"""
        )
        good = ["ok", digest(net)]
        for name in ("whole", "once-500", "once-503", "reset", "truncated", "flip-once again", "config-flip again"):
            assert found[name] == good, name
        ranges = [h.get("Range") for path, h in server.headers if "for=lab/reset" in path or "for=lab/trunc" in path]
        assert [r for r in ranges if r], "no download was resumed"
        assert "500" in found["always-500"][1]
        for name in ("flip-once", "flip-always"):
            kind, message = found[name]
            assert kind == "IntegrityError"
            recorded = json.loads((folder / "config.json").read_text())["weights"]["sha256"]
            assert f"config.json says {recorded}. It was removed from the cache; try again." in message
            assert message.count("its sha256 is") == 1
        assert found["config-flip"][0] == "IntegrityError"
        assert "its git digest is" in found["config-flip"][1]
        assert found["gated"][0] == "WeightsError"
        assert "is gated: ask for access" in found["gated"][1]
        assert found["no-weights"] == [
            "MissingWeightsError",
            f"lab/no-weights on {server.url} has no model.safetensors.",
        ]
        assert "lab/missing" in found["missing"][1]
        assert found["whole@no-such"][1] == f"lab/whole@no-such on {server.url} has no such revision."
        assert found["whole/too/long"][0] == "ValueError"
        # Nothing half-written and nothing damaged stays in the cache.
        weights = (folder / "model.safetensors").read_bytes()
        for path in blobs(reader.home):
            if len(path.name) == 64:
                assert path.read_bytes() == weights, path
        assert not list((reader.home / "hub" / "models--lab--flip-always").rglob("model.safetensors"))

    def test_damaged_before_it_was_committed(self, server, client, net, tmp_path):
        """A digest that fits bytes that are no safetensors file, and a file cut short after its digest was taken."""
        for name in ("garbage", "cut"):
            out = timm_eca_hub.save(net, tmp_path / name)
            whole = (out / "model.safetensors").read_bytes()
            content = b"\xff" * 1000 if name == "garbage" else whole[: len(whole) // 2]
            (out / "model.safetensors").write_bytes(content)
            if name == "garbage":
                import hashlib

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


class TestEntrypoints:
    def test_org_digest_and_missing(self, server, client, folder, net, tmp_path):
        server.put(f"lab/{PUBLISHED}", folder)
        server.put(f"timm-eca/{PUBLISHED}", folder)
        server.fault("GET", f"for=timm-eca/{PUBLISHED}", "flip")
        found = client().run(
            f"""
import os
create = lambda name="{NET}", **kwargs: timm.create_model(name, pretrained=True, **kwargs)
attempt("flipped", create)
attempt("then whole", create)
os.environ["TIMM_ECA_HUB_ORG"] = "lab"
attempt("org", create)
attempt("tag", lambda: create("{PUBLISHED}"))
attempt("source", create, lambda model: model.pretrained_cfg["hf_hub_id"])
attempt("head", lambda: create(num_classes=3), lambda model: model.num_classes)
attempt("features", lambda: create(features_only=True), lambda model: model.pretrained_cfg["hf_hub_id"])
attempt("by id", lambda: create("hf-hub:timm-eca/{PUBLISHED}"))
attempt("missing", lambda: create("eca_resnet101"))
attempt("never released", lambda: create("eca_resnext50_32x4d"))
os.environ["TIMM_ECA_WEIGHTS"] = FOLDER
before = len(list(Path(os.environ["HF_HOME"]).rglob("*")))
attempt("lab folder", lambda: create(cache_dir="empty"))
attempt("explicit id", lambda: create(pretrained_cfg_overlay=dict(hf_hub_id="lab/none")))
os.environ["TIMM_ECA_WEIGHTS"] = "nowhere"
attempt("no folder", create)
""".replace("FOLDER", repr(str(folder.parent)))
        )
        good = ["ok", digest(net)]
        assert found["flipped"][0] == "IntegrityError"
        for name in ("then whole", "org", "tag", "by id", "lab folder"):
            assert found[name] == good, name
        assert found["source"] == found["features"] == ["ok", f"lab/{PUBLISHED}"]
        assert found["head"] == ["ok", 3]
        assert found["missing"] == [
            "MissingWeightsError",
            f"lab/eca_resnet101.ecanet_in1k on {server.url} does not exist, or is private and HF_TOKEN or hf auth login"
            " is needed. The weights of eca_resnet101 are files of the paper's authors"
            " (https://github.com/BangguWu/ECANet), which must be converted: timm-eca convert CHECKPOINT"
            " DIR/eca_resnet101.ecanet_in1k --model eca_resnet101, then set TIMM_ECA_WEIGHTS=DIR.",
        ]
        assert "released no weights of eca_resnext50_32x4d" in found["never released"][1]
        assert "lab/none" in found["explicit id"][1]
        assert "TIMM_ECA_WEIGHTS must be a folder" in found["no folder"][1]


def test_server_down_and_offline(server, client, folder, net):
    server.put("lab/net", folder)
    warm = client()
    assert warm.run('attempt("load", lambda: hub.load("lab/net"))')["load"] == ["ok", digest(net)]
    server.stop()
    code = """
attempt("warm", lambda: hub.load("lab/net"))
attempt("cold", lambda: hub.load("lab/net", cache_dir="empty"))
attempt("push", lambda: hub.push(net(1), "lab/net"), str)
"""
    down = warm.start(code, HF_TOKEN=WRITER)
    offline = Client(server.url, warm.home).start(code, HF_HUB_OFFLINE="1", HF_TOKEN=WRITER)
    for found in (down.results(), offline.results()):
        assert found["warm"] == ["ok", digest(net)]
        assert found["cold"][0] == "WeightsError"
        assert "is not in the cache, and the Hub is offline or cannot be reached" in found["cold"][1]
        assert found["push"][0] == "WeightsError"


def test_faults_while_pushing(server, client, folder):
    server.put("lab/always", folder)
    before = server.repos["lab/always"].refs["main"]
    server.fault("PUT", "/lfs/lab/always", 500, times=-1)
    server.fault("PUT", "/lfs/lab/once", 500)
    server.fault("PUT", "/lfs/lab/reset", "reset")
    server.fault("POST", "lab/refused/commit", 503, times=-1)
    found = client().run(
        """
from timm_eca.cli import main
model = net(1)
for name in ("always", "once", "reset", "refused"):
    model.conv_stem.weight.data.add_(1)  # other bytes each time, so that each is sent
    attempt(name, lambda: hub.push(model, f"lab/{name}"), str)
hub.save(model, "saved")
attempt("cli", lambda: main(["push", "saved", "lab/cli", "--private"]), str)
attempt("cli verify", lambda: main(["verify", "lab/cli"]), str)
attempt("cli missing", lambda: main(["verify", "lab/none"]), str)
attempt("cli nothing", lambda: main(["push", "nothing", "lab/cli"]), str)
""",
        HF_TOKEN=WRITER,
    )
    assert found["always"][0] == "WeightsError"
    assert server.repos["lab/always"].refs["main"] == before
    assert found["once"][0] == found["reset"][0] == "ok"
    assert found["refused"][0] == "WeightsError"
    assert list(server.files("lab/refused")) == [".gitattributes"]
    assert [found[key][1] for key in ("cli", "cli verify", "cli missing", "cli nothing")] == ["0", "0", "2", "2"]
    assert server.repos["lab/cli"].private


def test_two_at_once(server, client, folder, net):
    server.put("lab/net", folder)
    code = 'attempt("load", lambda: hub.load("lab/net"))'
    one = client()
    both = [one.start(code), Client(server.url, one.home).start(code)]
    assert [process.results()["load"] for process in both] == [["ok", digest(net)]] * 2
    push = 'attempt("push", lambda: hub.push(net({}), "lab/new"), str)'
    both = [client().start(push.format(seed), HF_TOKEN=WRITER) for seed in (1, 2)]
    found = [process.results()["push"][0] for process in both]
    assert found == ["ok", "ok"]
    for commit in list(server.repos["lab/new"].commits)[1:]:
        files = server.files("lab/new", commit)
        recorded = json.loads(files["config.json"])["weights"]["sha256"]
        assert recorded == server.repos["lab/new"].commits[commit]["model.safetensors"]

"""Clients of the Hub in processes of their own, each with a fresh cache; and what they leave behind.

huggingface_hub reads its environment when it is imported, so each client imports it anew. PyTorch takes most of the
start and reads nothing of it: the processes are forked from one that has imported torch and torchvision alone.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time

# Waiting between the client's retries is not what is tested; with its chunks of 10 MB a small file is never resumed.
PRELUDE = """
import json, time
from pathlib import Path
nap, time.sleep = time.sleep, lambda seconds: nap(min(seconds, 0.05))
import huggingface_hub, timm, torch, timm_eca
from hub_client import digest
from timm_eca import hub
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
torch.set_num_threads(1)
results = {}
def attempt(name, call, shown=digest):
    try:
        results[name] = ["ok", shown(call())]
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]
def net(seed, classes=4):
    torch.manual_seed(seed)
    return timm.create_model("eca_mobilenetv2_050", num_classes=classes)
"""
EPILOGUE = "\nPath('results').write_text(json.dumps(results))\n"


def digest(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def blobs(home):
    return sorted(p for p in home.rglob("blobs/*") if p.is_file())


def _fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])
    return context


PROCESSES = _fork_server()


def _run(code, env, cwd):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    exec(code, {"__name__": "__main__"})


class Client:
    """One process with its own HF_HOME; without hf_xet unless asked."""

    def __init__(self, url, home, xet=False):
        self.home = home
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TIMM_ECA"))}
        self.env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        self.env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_XET_TELEMETRY_ENABLED": "0", "TMPDIR": str(home.parent)}
        self.env |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}

    def again(self):
        """Another process with the same cache."""
        client = Client(self.env["HF_ENDPOINT"], self.home)
        client.env = self.env
        return client

    def start(self, code, **env):
        return self.spawn(PRELUDE + code + EPILOGUE, env)

    def spawn(self, code, env, cwd=None):
        self.cwd = cwd or self.home.parent / f"cwd-{time.monotonic_ns()}"
        self.cwd.mkdir(exist_ok=True)
        self.process = PROCESSES.Process(target=_run, args=(code, self.env | env, self.cwd))
        self.process.start()
        return self

    def wait(self):
        """Return exit code, output and error output."""
        self.process.join(timeout=120)
        self.process.kill()
        return self.process.exitcode, *((self.cwd / name).read_text() for name in ("output", "errors"))

    def results(self):
        code, *output = self.wait()
        assert code == 0, output
        return json.loads((self.cwd / "results").read_text())

    def run(self, code, **env):
        return self.start(code, **env).results()

    def kill_when(self, reached, number=signal.SIGKILL):
        """Send the process a signal as soon as a condition holds."""
        for _ in range(1200):
            if reached() or not self.process.is_alive():
                break
            time.sleep(0.05)
        os.kill(self.process.pid, number)
        self.process.join(timeout=60)
        assert reached()

    def command(self, *arguments, cwd=None, **env):
        """Run timm-eca; return its exit code, output and error output."""
        code = f"import sys, timm_eca.cli\nsys.exit(timm_eca.cli.main({[*map(str, arguments)]}))"
        return self.spawn(code, env, cwd).wait()

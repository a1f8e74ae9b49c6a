"""A folder that looks like a checkout of timm, and how to start the launcher in it."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def make_checkout(folder: Path, version: str = "1.0.28", script: str = "small_train.py") -> Path:
    (folder / "timm").mkdir(parents=True)
    (folder / "timm" / "__init__.py").write_text("raise ImportError('the checkout shadows the installed timm')\n")
    (folder / "timm" / "version.py").write_text(f"__version__ = '{version}'\n")
    shutil.copy(HERE / script, folder / "train.py")
    return folder


def start(*arguments, module="timm_eca.scripts", cwd=None, env=None, **kwargs) -> subprocess.Popen:
    kwargs = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **kwargs,
    )


def run(*arguments, stdin="", **kwargs) -> tuple[int, str, str]:
    process = start(*arguments, **kwargs)
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out, err


def meeting_point() -> list[str]:
    """Options of torchrun for one of two nodes of one process each, which meet on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test"]
    return [*meet, f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]

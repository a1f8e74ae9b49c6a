"""timm's own train.py under torchrun with gloo on CPU, two processes: same loss as one, options, kill -9 and resume."""

import csv
import io
import os
import re
import shlex
import signal
import tarfile
import threading
from pathlib import Path

import pytest
import timm
import torch

from real_checkout import REAL, needs_timms_scripts
from small_checkout import meeting_point, start
from timm_eca import attn_modules
from timm_eca.demo.digits import write_digits

pytestmark = needs_timms_scripts

CPU = ["--device", "cpu", "--device-modules", "timm_eca.scripts.cpu_ddp", "--workers", "0", "--no-prefetcher"]
PLAIN = shlex.split("--num-classes 4 --input-size 3 32 32 --val-split val --no-aug --smoothing 0 --output .")
PLAIN += shlex.split("--opt momentum --sched step --warmup-epochs 0 --log-interval 1")
ECA_GROUP_NORM = ["--model", "resnet18", "--model-kwargs", "attn_layer=eca", "norm_layer=groupnorm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """64 training and 64 validation images of four digits, as `few/`."""
    folder = tmp_path_factory.mktemp("few")
    write_digits(folder / "all", seed=0)
    for split in ("train", "val"):
        for digit in range(4):
            (folder / "few" / split / str(digit)).mkdir(parents=True)
            for image in sorted((folder / "all" / split / str(digit)).iterdir())[:16]:
                image.rename(folder / "few" / split / str(digit) / image.name)
    return folder


def train(folder, experiment, *arguments, torchrun=("--standalone", "--nproc_per_node=2")):
    line = ["train", "--data-dir", "few", *CPU, *PLAIN, "--experiment", experiment, *arguments]
    env = {"TIMM_SCRIPTS": str(REAL)}
    if not torchrun:
        return start(*line, cwd=folder, env=env)
    return start(*torchrun, "-m", "timm_eca.scripts", *line, module="torch.distributed.run", cwd=folder, env=env)


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def epochs(folder, experiment):
    with open(folder / experiment / "summary.csv") as file:
        return [row for row in csv.DictReader(file) if row["epoch"] != "epoch"]


def losses(folder, experiment):
    return torch.tensor(
        [[float(row[key]) for key in ("train_loss", "eval_loss")] for row in epochs(folder, experiment)]
    )


def test_same_loss_as_one_process(folder):
    """64 images an update: in one process, in two, in two that gather gradients over two steps, and as two nodes."""
    options = [*ECA_GROUP_NORM, "--epochs", "3", "--lr", "0.005"]
    finish(train(folder, "one", *options, "-b", "64", torchrun=()))
    finish(train(folder, "two", *options, "-b", "32"))
    finish(train(folder, "gathered", *options, "-b", "16", "--grad-accum-steps", "2"))
    meet = meeting_point()
    for node in [train(folder, "nodes", *options, "-b", "32", torchrun=meet) for _ in range(2)]:
        finish(node)
    assert losses(folder, "one").shape == (3, 2)
    for name in ("two", "gathered", "nodes"):
        torch.testing.assert_close(losses(folder, name), losses(folder, "one"), rtol=1e-5, atol=0)


def test_sync_bn_is_one_process_too(folder):
    """With statistics of all 64 images, batch norm in two processes is what it is in one; without, it is not."""
    options = ["--model", "eca_resnet18", "--epochs", "2", "--lr", "0.005"]
    finish(train(folder, "bn-one", *options, "-b", "64", torchrun=()))
    finish(train(folder, "bn-synced", *options, "-b", "32", "--sync-bn"))
    finish(train(folder, "bn-own", *options, "-b", "32"))
    torch.testing.assert_close(losses(folder, "bn-synced"), losses(folder, "bn-one"), rtol=1e-4, atol=0)
    assert not torch.allclose(losses(folder, "bn-own"), losses(folder, "bn-one"), rtol=1e-3, atol=0)


def test_webdataset(folder):
    """Two processes stream shards, as docs/training.md has it, and see all images."""
    pytest.importorskip("webdataset")
    (folder / "shards").mkdir()
    for split in ("train", "val"):
        for shard in range(2):
            with tarfile.open(folder / "shards" / f"few-{split}-{shard}.tar", "w") as tar:
                for index, image in enumerate(sorted((folder / "few" / split).glob("*/*.png"))[shard::2]):
                    add(tar, f"{index:03}.png", image.read_bytes())
                    add(tar, f"{index:03}.cls", image.parent.name.encode())
    options = ["--dataset", "wds/few", "--data-dir", "shards", "--model", "eca_resnet18", "--epochs", "1", "-b", "8"]
    for split in ("train", "val"):
        options += [f"--{split}-split", f"few-{split}-{{0..1}}.tar", f"--{split}-num-samples", "64"]
    told = finish(train(folder, "streamed", *options, "--lr", "0.01"))
    assert re.search(r"Train: 0 \[ +3/4 \(100%\)\]", told), told
    assert losses(folder, "streamed").isfinite().all()


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def test_options_and_resume(folder):
    options = shlex.split("--model eca_resnet18 -b 8 --lr 0.01 --grad-accum-steps 2 --model-ema --model-ema-decay 0.5")
    options += shlex.split("--amp --amp-dtype bfloat16 --torchcompile aot_eager --sync-bn")
    finish(train(folder, "options", *options, "--epochs", "1"))
    last = folder / "options" / "last.pth.tar"
    checkpoint = torch.load(last, weights_only=False)
    ema, weights = checkpoint["state_dict_ema"], checkpoint["state_dict"]
    assert set(ema) == set(weights)
    assert not torch.equal(ema["layer1.0.se.conv.weight"], weights["layer1.0.se.conv.weight"])
    finish(train(folder, "options", *options, "--epochs", "2", "--resume", str(last)))
    assert [row["epoch"] for row in epochs(folder, "options")] == ["0", "1"]
    model = timm.create_model("eca_resnet18", num_classes=4, checkpoint_path=str(last))
    assert all(torch.isfinite(layer.conv.weight).all() for layer in attn_modules(model).values())


def test_kill_and_resume(folder):
    """A kill -9 of one rank in the middle of an epoch costs that epoch alone."""
    options = ["--model", "eca_resnet18", "-b", "2", "--lr", "0.01"]
    process = train(folder, "killed", *options, "--epochs", "9")
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    for line in process.stderr:
        if re.search(r"Train: 2 \[ +3/", line):
            break
    second = ranks(process.pid)[1]
    os.kill(second, signal.SIGKILL)
    process.communicate(timeout=120)
    watchdog.cancel()
    assert process.returncode == 1
    assert [row["epoch"] for row in epochs(folder, "killed")] == ["0", "1"]
    finish(train(folder, "killed", *options, "--epochs", "3", "--resume", str(folder / "killed" / "last.pth.tar")))
    assert [row["epoch"] for row in epochs(folder, "killed")] == ["0", "1", "2"]


def ranks(pid):
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    by_rank = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        told = dict(entry.split("=", 1) for entry in environment if "=" in entry)
        if "RANK" in told:
            by_rank[int(told["RANK"])] = child
    assert sorted(by_rank) == [0, 1]
    return by_rank

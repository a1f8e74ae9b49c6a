"""Files that are not converted: a clear error, and nothing left behind."""

import functools
import os
import pickle
import re
import signal

import pytest
import timm
import torch
from hub_client import Client
from official import training_checkpoint
from safetensors.torch import save_file

from timm_eca.cli import main
from timm_eca.convert import convert

NOT_READABLE = "is truncated, or no file of torch.save or safetensors"


def refused(path, tmp_path, message, **kwargs):
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out", **kwargs)
    assert not [p.name for p in tmp_path.iterdir() if p != path]


def test_other_model_expected(saved, tmp_path):
    message = r"holds eca_resnet18 with kernel sizes \(3, 5, 7, 7\) per stage, not eca_resnet50 as expected"
    refused(saved(), tmp_path, message, model="eca_resnet50.ecanet_in1k")


@pytest.mark.parametrize("name", ["resnet50", "eca_resnet18.in1k", "eca_resnext50_32x4d.ecanet_in1k"])
def test_unknown_model_expected(name, saved, tmp_path):
    refused(saved(), tmp_path, f"Unknown model '{name}'. Models that", model=name)


def test_not_the_released_file_by_its_keys(tmp_path):
    torch.save(timm.create_model("eca_resnet18").state_dict(), tmp_path / "last.pth")
    message = "is not the eca_resnet18 that the paper's authors released: it has timm's keys"
    refused(tmp_path / "last.pth", tmp_path, message, model="eca_resnet18.ecanet_in1k")


def test_not_the_released_file_by_its_shapes(saved, tmp_path):
    def shrink(checkpoint):
        weights = checkpoint["state_dict"]
        for key in ("fc.weight", "fc.bias"):
            weights[f"module.{key}"] = weights[f"module.{key}"][:9].clone()

    message = "the official code's keys, .* 9 classes"
    refused(saved(shrink), tmp_path, message, model="eca_resnet18.ecanet_in1k")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def in_a_checkpoint(path, **kwargs):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}, "optimizer": Evil()}, path, **kwargs)


WANTING_TO_RUN = {
    "zip": in_a_checkpoint,
    "legacy": functools.partial(in_a_checkpoint, _use_new_zipfile_serialization=False),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": Evil()})),
    "inst": lambda path: path.write_bytes(b"(S'touch was_run'\nios\nsystem\n."),
    "obj": lambda path: path.write_bytes(b"(cos\nsystem\nS'touch was_run'\no."),
    "a whole model": lambda path: torch.save(timm.create_model("test_resnet"), path),
    "TorchScript": lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path),
}


@pytest.mark.parametrize("kind", WANTING_TO_RUN)
def test_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WANTING_TO_RUN[kind](tmp_path / "w.pth")
    named = {"a whole model": "timm.models.resnet.ResNet", "TorchScript": "TorchScript.*"}.get(kind, r"\w+\.system")
    refused(tmp_path / "w.pth", tmp_path, rf"refused: it is a pickle that wants to run code \({named}\)")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated(resnet18, tmp_path, part, legacy):
    path = tmp_path / "cut.pth"
    torch.save(training_checkpoint(resnet18), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refused(path, tmp_path, NOT_READABLE)


def test_truncated_anywhere_in_its_pickles(tmp_path):
    """What torch and pickle raise depends on the byte."""
    path = tmp_path / "cut.pth"
    torch.save({"arch": "x" * 300, "epoch": 12345678901}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, tmp_path, NOT_READABLE)


def test_truncated_safetensors(resnet18, tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(resnet18.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, tmp_path, "damaged safetensors file")


@pytest.mark.parametrize("content", [b"PK\x03\x04 not a zip", b"<html>404</html>", b"\x80\x02", b"x" * 4096])
def test_something_else(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    refused(path, tmp_path, NOT_READABLE)


def test_no_file(tmp_path):
    refused(tmp_path / "none.pth", tmp_path, r"There is no file .*none\.pth")


def test_plain_backbone(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, r"nearest is eca_resnet18: layer1.0.se.conv.weight is missing; .* 4 more")


def test_foreign(tmp_path):
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, r"keys such as blocks\.0\.attn\.qkv\.weight")


def test_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, "holds a list, no checkpoint")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, "holds no state dict: epoch is no tensor")


def test_no_ema(saved, tmp_path):
    refused(saved(), tmp_path, r"no moving average .*it has epoch, arch, state_dict, best_prec1", ema=True)


def test_not_finite(saved, tmp_path):
    def spoil(checkpoint):
        weights = checkpoint["state_dict"]
        weights["module.layer2.0.bn1.running_var"] = torch.full((128,), torch.nan)

    refused(saved(spoil), tmp_path, r"not finite \(NaN or infinity\) as float32 in layer2\.0\.bn1\.running_var\.")


def test_finite_in_the_file_alone(resnet18, tmp_path):
    weights = resnet18.state_dict()
    torch.save(weights | {"fc.bias": torch.full((1000,), 1e300, dtype=torch.float64)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, r"not finite \(NaN or infinity\) as float32 in fc\.bias\.")


SPOILED = {
    "is int32 (64,), expected (64,)": lambda tensor: tensor.int(),
    "is complex64 (64,), expected (64,)": lambda tensor: tensor.to(torch.complex64),
    "tensors that are sparse, quantized or without values: bn1.weight.": lambda tensor: tensor.to_sparse(),
    "tensors that are sparse, quantized or without values: bn1.weight": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("message", SPOILED)
def test_odd_tensors(message, resnet18, tmp_path):
    weights = resnet18.state_dict()
    torch.save(weights | {"bn1.weight": SPOILED[message](weights["bn1.weight"])}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, re.escape(message))


def test_classifier_that_does_not_fit_itself(resnet18, tmp_path):
    torch.save(resnet18.state_dict() | {"fc.bias": torch.zeros(7)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, r"nearest is eca_resnet18: fc.bias is \(7,\), expected \(1000,\)\.")
    torch.save(
        resnet18.state_dict() | {"fc.weight": torch.zeros(0, 512), "fc.bias": torch.zeros(0)}, tmp_path / "w.pth"
    )
    refused(tmp_path / "w.pth", tmp_path, r"fc.weight is \(0, 512\), expected \(1000, 512\)")


def test_twice(resnet18, tmp_path):
    weights = resnet18.state_dict()
    torch.save(weights | {f"module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, "holds the same tensors more than once")


@pytest.mark.parametrize("last", ["eca", "se"])
def test_twice_by_two_layouts(last, resnet18, tmp_path):
    """Neither wins."""
    keys = [f"layer1.0.{name}.conv.weight" for name in ("eca", "se")]
    weights = resnet18.state_dict()
    weights |= {keys[1]: weights[keys[0]] + 1}
    if last == "eca":
        weights = {keys[1]: weights[keys[1]], **weights}
        keys.reverse()
    torch.save(weights, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", tmp_path, re.escape(f"w.pth holds one weight twice, as {keys[0]} and as {keys[1]}"))


def test_half(saved, tmp_path):
    def halve(checkpoint):
        weights = checkpoint["state_dict"]
        del weights["module.layer2.0.bn1.weight"], weights["module.fc.bias"]
        weights["module.head.weight"] = torch.zeros(2)

    message = "layer2.0.bn1.weight is missing; fc.bias is missing; head.weight has no place."
    refused(saved(halve), tmp_path, f"nearest is eca_resnet18: {re.escape(message)}")


def test_two_kernel_sizes_in_a_stage(saved, tmp_path):
    def widen(checkpoint):
        checkpoint["state_dict"]["module.layer2.0.eca.conv.weight"] = torch.zeros(1, 1, 3)

    refused(saved(widen), tmp_path, r"kernel sizes .*2: \{3, 5\}.* accepted: one odd size")


def test_band_matrix(saved, tmp_path):
    def spread(checkpoint):
        checkpoint["state_dict"]["module.layer1.0.eca.conv.weight"] = torch.zeros(64, 1, 3)

    refused(saved(spread), tmp_path, r"layer1.0.se.conv.weight is \(64, 1, 3\), expected \(1, 1, 3\)")


def test_folder_in_use_at_home(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} exists and is not an empty folder"):
        convert(saved(), "~")


def test_a_folder_that_safetensors_could_not_open(saved, tmp_path):
    path = saved()
    with pytest.raises(ValueError, match=r"is not UTF-8, and safetensors takes no other paths\. Give another folder"):
        convert(path, os.fsdecode(os.fsencode(tmp_path / "out") + b"\xe9"))
    assert list(tmp_path.iterdir()) == [path]


def test_folder_in_use(saved, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(["convert", str(saved()), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("out exists and is not an empty folder. Give a new one.\n")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


CONVERT = "import sys, timm_eca.cli\nsys.exit(timm_eca.cli.main(['convert', {path!r}, {out!r}]))"
STALLED = """
import time
from pathlib import Path
import timm_eca.saving
def half(tensors, path, **kwargs):
    path.write_bytes(b"half of it")
    Path("writing").touch()
    time.sleep(60)
timm_eca.saving.save_file = half
"""
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
"""


@pytest.fixture
def converter(saved, tmp_path):
    """Start a conversion to `out` in a process of its own, after some code."""
    (tmp_path / "of the process").mkdir()
    code = CONVERT.format(path=str(saved()), out=str(tmp_path / "out"))
    process = Client("http://127.0.0.1:9", tmp_path / "of the process" / "home")
    return lambda before="": process.spawn(before + code, {})


def left_behind(tmp_path):
    return sorted({path.name for path in tmp_path.iterdir()} - {"of the process", "model_best.pth.tar"})


def test_full_disk(converter, tmp_path):
    code, output, error = converter(FULL_DISK).wait()
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"timm-eca: cannot write to {tmp_path}/out: ")
    assert left_behind(tmp_path) == []


def test_interrupted(converter, tmp_path):
    process = converter(STALLED)
    process.kill_when((process.cwd / "writing").exists, signal.SIGINT)
    assert process.wait() == (130, "", "timm-eca: interrupted\n")
    assert left_behind(tmp_path) == []


def test_killed(converter, tmp_path):
    """Nothing can clean up then; but there is no folder of the name asked for, and the next try succeeds."""
    process = converter(STALLED)
    process.kill_when((process.cwd / "writing").exists)
    assert not (tmp_path / "out").exists()
    assert all(name.startswith(".out-") for name in left_behind(tmp_path))
    code, output, _ = converter().wait()
    assert (code, output) == (
        0,
        f"eca_resnet18, kernel size per stage 3, 5, 7, 7, 1000 classes: saved to {tmp_path}/out\n",
    )

"""The demo for real, two epochs instead of ten."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
from PIL import Image

from timm_eca import hub
from timm_eca.cli import main
from timm_eca.demo.digits import write_digits
from timm_eca.demo.figures import mean_channel_weights
from timm_eca.demo.training import make_loaders
from timm_eca.weights import read_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.run(
        [sys.executable, "-m", "timm_eca.cli", "demo", "--epochs", "2", "--out", "out"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / "out", process.stdout, process.stderr


def test_table(finished):
    _, printed, progress = finished
    rows = [line.split() for line in printed.splitlines() if line.startswith("resnet18")]
    assert [row[0:-4] for row in rows] == [["resnet18"], ["resnet18", "+", "eca"]]
    assert [row[-4:-2] for row in rows] == [["11,175,370", "0"], ["11,175,406", "36"]]
    for way in ("timm_eca.hub.load('...')", "timm.create_model('local-dir:...', pretrained=True)"):
        assert f"Reloaded with {way}: logits identical on 360 images" in printed
    assert "2 epochs each" in printed
    assert "100%" in progress


def test_files(finished):
    out, _, _ = finished
    assert {p.name for p in out.iterdir()} == {"digits", "model", "curves.png", "channel_weights.png", "results.json"}
    for name in ("curves.png", "channel_weights.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert {p.name for p in (out / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert not [p for p in out.parent.iterdir() if p != out]


def test_learned(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    assert results["versions"]["timm"] == timm.__version__
    for history in results["histories"].values():
        assert len(history["top1"]) == len(history["train_loss"]) == 2
        assert history["train_loss"][1] < history["train_loss"][0]
    assert max(row["top-1 (%)"] for row in results["rows"]) > 20  # chance is 10


def test_saved_model_knows_its_data(finished):
    folder = finished[0] / "model"
    for model in (hub.load(folder), timm.create_model(f"local-dir:{folder}", pretrained=True)):
        config = timm.data.resolve_model_data_config(model)
        assert [list(config[k]) for k in ("input_size", "mean", "std")] == [[1, 32, 32], [0.5], [0.5]]
        assert model.attn_spec.name == "eca"
        assert model.pretrained_cfg["tag"] == "digits"
    assert read_config(folder)["label_names"] == [str(digit) for digit in range(10)]
    assert "trained by `timm-eca demo` on scikit-learn's scanned digits" in (folder / "README.md").read_text()


def test_saved_model_is_verified(finished, capsys):
    assert main(["verify", str(finished[0] / "model")]) == 0
    assert "intact" in capsys.readouterr().out


def test_an_earlier_demo_is_replaced(finished, capsys):
    out, _, _ = finished
    mine = out / "digits" / "train" / "3" / "mine.png"
    mine.touch()
    assert main(["demo", "--epochs", "1", "--out", str(out)]) == 2
    assert "holds other files than those of timm-eca demo, such as digits/train/3/mine.png" in capsys.readouterr().err
    mine.unlink()
    assert main(["demo", "--epochs", "1", "--out", str(out)]) == 0
    assert "validation images, 1 epoch each," in capsys.readouterr().out
    assert len(json.loads((out / "results.json").read_text())["histories"]["resnet18"]["top1"]) == 1
    assert not [p for p in out.parent.iterdir() if p != out]


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    assert write_digits(tmp_path, seed=0) == (1437, 360)
    files = sorted(tmp_path.glob("*/*/*.png"))
    assert len(files) == 1797 == len({f.name for f in files})
    digits = load_digits()
    for file in files[::97]:
        index = int(file.stem)
        assert file.parent.name == str(digits.target[index])
        with Image.open(file) as picture:
            pixels = np.asarray(picture, float)
        assert (pixels * 16 / 255).round().tolist() == digits.images[index].tolist()
    for digit in range(10):
        held_out = len(list((tmp_path / "val" / str(digit)).iterdir()))
        assert held_out / (digits.target == digit).sum() == pytest.approx(0.2, abs=0.005)


def test_mean_channel_weights(tmp_path):
    """Against a plain loop over single images."""
    import torch

    write_digits(tmp_path, seed=0)
    loader = make_loaders(tmp_path)[1]
    model = timm.create_model("resnet18", num_classes=10, in_chans=1, attn_layer="eca").eval()
    images, targets = next(iter(loader))
    ours = mean_channel_weights(model, [(images[:20], targets[:20]), (images[20:30], targets[20:30])], 10)
    seen = {}
    layer = model.layer3[1].se
    layer.register_forward_pre_hook(lambda m, inputs: seen.update(weights=m.channel_weights(inputs[0])[0]))
    per_class = {}
    with torch.no_grad():
        for image, target in zip(images[:30], targets[:30]):
            model(image[None])
            per_class.setdefault(int(target), []).append(seen["weights"])
    for target, rows in per_class.items():
        torch.testing.assert_close(ours["layer3.1.se"][target], torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5)


class TestRefusals:
    """One line on stderr, exit code 2, nothing written."""

    @staticmethod
    def check(capsys, arguments, message):
        assert main(["demo", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("timm-eca: ")
        assert printed.err.count("\n") == 1
        assert message in printed.err

    def test_epochs(self, capsys, tmp_path):
        self.check(capsys, ["--epochs", 0, "--out", tmp_path / "out"], "--epochs must be at least 1, got 0")
        assert not list(tmp_path.iterdir())

    def test_folder_with_other_files(self, capsys, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        self.check(capsys, ["--out", tmp_path], "holds other files than those of timm-eca demo")
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file(self, capsys, tmp_path):
        (tmp_path / "out").write_text("mine")
        self.check(capsys, ["--out", tmp_path / "out"], "is not a folder")
        self.check(capsys, ["--out", tmp_path / "out" / "below"], "cannot write to")
        assert (tmp_path / "out").read_text() == "mine"

    def test_unwritable(self, capsys):
        self.check(capsys, ["--out", "/proc/timm-eca/out"], "cannot write to /proc/timm-eca/out")

    def test_missing_package(self, capsys, tmp_path, monkeypatch):
        import importlib.util

        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
        self.check(capsys, ["--out", tmp_path / "out"], "the demo needs scikit-learn: pip install scikit-learn")
        assert not list(tmp_path.iterdir())

    def test_interrupted(self, capsys, tmp_path, monkeypatch):
        from timm_eca.demo import run

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(run, "train", interrupt)
        assert main(["demo", "--out", str(tmp_path / "out")]) == 130
        assert capsys.readouterr().err == "timm-eca: interrupted\n"
        assert not list(tmp_path.iterdir())

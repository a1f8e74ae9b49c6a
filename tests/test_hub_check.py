"""Folders in Hub format that are damaged, or whose config and weights do not belong together, by every way in."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from conftest import randomize_
from timm_eca import hub
from timm_eca.cli import main
from timm_eca.errors import IntegrityError, MissingWeightsError, WeightsError
from timm_eca.weights import sha256_of

NET = "eca_mobilenetv2_050"


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def set_weights(folder, edit):
    """Change the tensors and record the digest of the new file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    change(folder, weights={"sha256": sha256_of(path)})


def flip(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGE = {
    "flipped": (flip, IntegrityError, "is not what it should be: its sha256 is"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), MissingWeightsError, "has no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), MissingWeightsError, "is no folder in Hub format"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), IntegrityError, "is not valid JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), IntegrityError, "is no model's config"),
    "no tensors": (lambda f: set_weights(f, lambda t: t.clear()), IntegrityError, "holds no tensors"),
    "no sha256": (lambda f: change(f, weights={"sha256": "x"}), IntegrityError, "that is no sha256"),
    "unknown model": (
        lambda f: change(f, architecture="vgg0"),
        WeightsError,
        "is a 'vgg0', which timm .* does not have",
    ),
}
MISFIT = {
    "no digest": (lambda f: change(f, weights={}), "records no sha256"),
    "no arguments": (lambda f: change(f, model_args=[3]), "can be made as its config says"),
    "classes": (lambda f: change(f, num_classes="ten"), "can be made as its config says"),
    "preprocessing": (lambda f: change(f, pretrained_cfg=None), "can be made as its config says"),
    "arguments": (lambda f: change(f, model_args={"depth": 3}), r"can be made as its config says: .*'depth'"),
    "missing": (
        lambda f: set_weights(f, lambda t: t.pop("bn1.bias")),
        "1 of 331 tensors .* bn1.bias is absent",
    ),
    "foreign": (lambda f: set_weights(f, lambda t: t.update(x=torch.zeros(2))), r"x is \(2,\), not there"),
    "shape": (lambda f: change(f, model_args={"num_classes": 7}), r"classifier.bias is \(1000,\), not \(7,\)"),
}


class TestCheck:
    @pytest.fixture
    def copy(self, folder, tmp_path):
        return shutil.copytree(folder, tmp_path / "copy")

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damaged(self, kind, copy, capsys):
        damage, error, message = DAMAGE[kind]
        damage(copy)
        for check in (hub.load, hub.verify):
            with pytest.raises(error, match=message):
                check(copy)
        assert main(["verify", str(copy)]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize("kind", MISFIT)
    def test_misfit(self, kind, copy, capsys):
        damage, message = MISFIT[kind]
        damage(copy)
        for check in (hub.verify, hub.load)[: 1 if kind == "no digest" else 2]:  # that one loads
            with pytest.raises(IntegrityError, match=message):
                check(copy)
        assert main(["verify", str(copy)]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_intact(self, copy, capsys):
        found = hub.verify(copy)
        assert (found["architecture"], found["tensors"]) == (NET, 331)
        assert main(["verify", str(copy)]) == 0
        assert (
            capsys.readouterr().out == f"{copy}: intact. eca_mobilenetv2_050, 331 tensors, sha256 {found['sha256']}\n"
        )

    def test_lab_folder(self, copy, net, monkeypatch):
        """TIMM_ECA_WEIGHTS, by the published name or the model's; checked too."""
        monkeypatch.setenv("TIMM_ECA_WEIGHTS", str(copy.parent))
        for name in (f"{NET}.ecanet_in1k", NET):
            copy = copy.rename(copy.parent / name)
            model = timm.create_model(NET, pretrained=True)
            assert torch.equal(model.bn1.weight, load_file(copy / "model.safetensors")["bn1.weight"])
        flip(copy)
        with pytest.raises(IntegrityError, match="its sha256 is"):
            timm.create_model(NET, pretrained=True)

    @pytest.mark.parametrize("portable", [False, True])
    def test_lab_folder_of_ones_own_training(self, portable, tmp_path, monkeypatch):
        """Classes, channels and preprocessing are those that were saved, unless others are asked for."""
        sizes = {"kernel_sizes": "adaptive"}
        model = randomize_(timm.create_model("eca_resnet18", num_classes=10, in_chans=1, **sizes))
        hub.save(model, tmp_path / "eca_resnet18", portable=portable, data_config={"mean": (0.5,), "std": (0.25,)})
        monkeypatch.setenv("TIMM_ECA_WEIGHTS", "~/weights")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "weights").symlink_to(tmp_path)
        for again in (timm.create_model("eca_resnet18", pretrained=True, num_classes=n, **sizes) for n in (None, 10)):
            assert torch.equal(again.fc.bias, model.fc.bias)
            assert (again.num_classes, again.pretrained_cfg["mean"], again.conv1.in_channels) == (10, [0.5], 1)
        again = timm.create_model("eca_resnet18", pretrained=True, in_chans=3, **sizes)
        torch.testing.assert_close(again.conv1.weight.sum(1, keepdim=True), model.conv1.weight)
        overlay = {"mean": (0.1, 0.2, 0.3)}
        again = timm.create_model("eca_resnet18", True, pretrained_cfg_overlay=overlay, in_chans=1, **sizes)
        assert again.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
        assert torch.equal(again.conv1.weight, model.conv1.weight)
        assert again.pretrained_cfg["hf_hub_id"] == "timm-eca/eca_resnet18.ecanet_in1k"
        assert not {"file", "source"} & again.pretrained_cfg.keys()

    def test_lab_folder_of_another_model(self, copy, monkeypatch):
        monkeypatch.setenv("TIMM_ECA_WEIGHTS", str(copy.parent))
        copy.rename(copy.parent / "eca_mobilenetv2_100")
        with pytest.raises(WeightsError, match=f"holds a {NET}, not a eca_mobilenetv2_100"):
            timm.create_model("eca_mobilenetv2_100", pretrained=True, features_only=True)

    def test_lab_folder_that_lacks_tensors(self, copy, monkeypatch):
        monkeypatch.setenv("TIMM_ECA_WEIGHTS", str(copy.parent))
        set_weights(copy, lambda t: t.pop("bn1.bias"))
        copy.rename(copy.parent / NET)
        with pytest.raises(IntegrityError, match=r"bn1\.bias is absent"):
            timm.create_model(NET, pretrained=True, num_classes=3)

    def test_home(self, net, copy, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert torch.equal(hub.load("~/copy").bn1.weight, net.bn1.weight)
        assert hub.verify("~/copy")["tensors"] == 331

    def test_a_pickle_beside_is_not_read(self, copy):
        for name in ("pytorch_model.bin", "model.pth"):
            (copy / name).write_bytes(b"cos\nabort\n(tR.")
        hub.load(copy)
        (copy / "model.safetensors").unlink()
        with pytest.raises(MissingWeightsError, match="other formats than safetensors are not read"):
            hub.load(copy)

    @pytest.mark.parametrize("source", ["weights", "./weights", "a/b/c"])
    def test_neither_folder_nor_repository(self, source, capsys):
        assert main(["verify", source]) == 2
        assert "There is no folder" in capsys.readouterr().err

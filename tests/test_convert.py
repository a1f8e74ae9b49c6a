"""Converting checkpoints: against hand-built key tables and an independent statement of the official networks."""

import argparse
import os

import pytest
import timm
import torch
from golden import GOLDEN, KEYS
from official import official, training_checkpoint
from safetensors.torch import load_file, save_file

from conftest import randomize_
from timm_eca import hub
from timm_eca.cli import main
from timm_eca.convert import convert, infer
from timm_eca.layouts import in_timm_layout
from timm_eca.weights import read_config, sha256_of

PRESETS = {
    "eca_resnet18": (3, 5, 7, 7),
    "eca_resnet34": (3, 3, 5, 7),
    "eca_resnet50": (3, 5, 5, 7),
    "eca_resnet101": (3, 3, 5, 7),
    "eca_resnet152": (3, 3, 5, 7),
    "eca_mobilenetv2_100": (1, 1, 1, 1, 3, 3, 3),
}


class TestGolden:
    @pytest.mark.parametrize("name", GOLDEN)
    def test_keys_and_shapes(self, name):
        golden = GOLDEN[name]
        assert len(golden) == KEYS[name]
        with torch.device("meta"):
            weights = official(name).state_dict()
        assert {k: tuple(t.shape) for k, t in weights.items()} == {theirs: shape for theirs, _, shape in golden}
        found_official, renamed = in_timm_layout({theirs: shape for theirs, _, shape in golden})
        assert found_official
        assert renamed == {ours: shape for _, ours, shape in golden}
        model = timm.create_model(name, device="meta")
        assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == renamed

    @pytest.mark.parametrize("name", GOLDEN)
    def test_inferred_from_keys_and_shapes(self, name):
        found = infer({theirs: torch.zeros(()).expand(shape) for theirs, _, shape in GOLDEN[name]})
        assert (found.model, found.kernel_sizes) == (name, PRESETS[name])
        assert (found.num_classes, found.in_chans, found.official) == (1000, 3, True)

    @pytest.mark.parametrize("name", ["eca_resnet18", "eca_resnet50", "eca_mobilenetv2_100"])
    def test_logits(self, name, tmp_path, repository):
        torch.manual_seed(0)
        theirs = randomize_(official(name)).eval()
        torch.save(training_checkpoint(theirs), tmp_path / "any_name.pth.tar")
        found = convert(tmp_path / "any_name.pth.tar", tmp_path / "out", f"{name}.ecanet_in1k")
        assert found.model == name
        ours = hub.load(tmp_path / "out").eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for key, ours_key, _ in GOLDEN[name]:
            assert torch.equal(ours.state_dict()[ours_key], theirs.state_dict()[key])
        config = read_config(tmp_path / "out")
        assert config.pop("weights")["sha256"] == sha256_of(tmp_path / "out" / "model.safetensors")
        assert config == read_config(repository / "hub_configs" / f"{name}.ecanet_in1k")

    @pytest.mark.parametrize("name", ["eca_resnet34", "eca_resnet101", "eca_resnet152"])
    def test_logits_of_the_others(self, name):
        """As above, without the files, which are large."""
        theirs = randomize_(official(name)).eval()
        found = infer(theirs.state_dict())
        ours = timm.create_model(found.model, kernel_sizes=found.kernel_sizes).eval()
        ours.load_state_dict(found.tensors)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            logits = theirs(x)
            torch.testing.assert_close(ours(x), logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


class TestFormats:
    def loads(self, path, resnet18, tmp_path, **kwargs):
        convert(path, tmp_path / "out", **kwargs)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights["layer4.1.se.conv.weight"], resnet18.state_dict()["layer4.1.eca.conv.weight"])

    @pytest.mark.parametrize("model", [None, "eca_resnet18"])
    def test_nothing_is_claimed_of_another_training_by_the_official_code(self, model, saved, tmp_path):
        convert(saved(), tmp_path / "out", model)
        card = (tmp_path / "out" / "README.md").read_text()
        assert all(word not in card for word in ("70.92", "## Recipe", "authors", "license: mit", "ecanet_in1k"))
        config = read_config(tmp_path / "out")
        assert not {"tag", "license", "origin_url"} & config["pretrained_cfg"].keys()
        hub.verify(tmp_path / "out")

    def test_raw_state_dict(self, resnet18, tmp_path):
        torch.save(resnet18.state_dict(), tmp_path / "raw.pth")
        self.loads(tmp_path / "raw.pth", resnet18, tmp_path)

    def test_legacy_file(self, saved, resnet18, tmp_path):
        torch.save(training_checkpoint(resnet18), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        self.loads(tmp_path / "old.pth", resnet18, tmp_path)

    def test_safetensors(self, resnet18, tmp_path):
        save_file(resnet18.state_dict(), tmp_path / "weights")
        self.loads(tmp_path / "weights", resnet18, tmp_path)

    @pytest.mark.parametrize("safe", [False, True])
    def test_a_name_that_is_not_utf8(self, safe, resnet18, tmp_path):
        path = os.fsdecode(os.fsencode(tmp_path / "w") + b"\xe9")
        (save_file if safe else torch.save)(resnet18.state_dict(), tmp_path / "w")
        (tmp_path / "w").rename(path)
        self.loads(path, resnet18, tmp_path)
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert "converted by timm-eca from `w\\udce9`, sha256" in card

    def test_without_counters(self, saved, resnet18, tmp_path):
        def drop(checkpoint):
            weights = checkpoint["state_dict"]
            for key in [k for k in weights if k.endswith("num_batches_tracked")]:
                del weights[key]

        self.loads(saved(drop), resnet18, tmp_path)

    def test_name_and_arch_mean_nothing(self, saved, tmp_path, capsys):
        path = saved(lambda c: c.update(arch="se_resnet152"), "eca_resnet101_k3357.pth.tar")
        assert main(["convert", str(path), str(tmp_path / "out")]) == 0
        assert "eca_resnet18, kernel size per stage 3, 5, 7, 7, 1000 classes" in capsys.readouterr().out

    @pytest.mark.parametrize("ema", [False, True])
    def test_timm_training_checkpoint(self, tmp_path, ema):
        models = [randomize_(timm.create_model("eca_mobilenetv2_050", num_classes=7), seed) for seed in (0, 1)]
        checkpoint = {
            "epoch": 3,
            "arch": "eca_mobilenetv2_050",
            "args": argparse.Namespace(model="eca_mobilenetv2_050"),
            "state_dict": models[0].state_dict(),
            "state_dict_ema": models[1].state_dict(),
        }
        torch.save(checkpoint, tmp_path / "last.pth.tar")
        found = convert(tmp_path / "last.pth.tar", tmp_path / "out", ema=ema)
        assert (found.num_classes, found.official) == (7, False)
        again = hub.load(tmp_path / "out")
        assert torch.equal(again.bn1.weight, models[ema].bn1.weight)
        assert again.num_classes == 7

    def test_model_of_no_release(self, tmp_path):
        name, sizes = "eca_inception_v3", (3, 5, 9)  # of the stages that carry the layer, which are 5 to 7
        weights = randomize_(timm.create_model(name, kernel_sizes=sizes, num_classes=3)).state_dict()
        save_file(weights, tmp_path / "weights")
        found = convert(tmp_path / "weights", tmp_path / "out")
        assert (found.model, found.kernel_sizes) == (name, sizes)
        again = hub.load(tmp_path / "out").state_dict()
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[key], weights[key]) for key in weights)
        hub.verify(tmp_path / "out")

    def test_other_kernel_sizes_and_channels(self, tmp_path):
        model = timm.create_model("eca_resnet18", kernel_sizes=(1, 9, 3, 5), in_chans=1, num_classes=4)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        found = convert(tmp_path / "w.pth", tmp_path / "out")
        assert (found.kernel_sizes, found.in_chans, found.num_classes) == ((1, 9, 3, 5), 1, 4)
        assert hub.load(tmp_path / "out").layer2[0].se.conv.kernel_size == (9,)
        hub.verify(tmp_path / "out")

"""What loads, what raises, and by which way in: each of timm's and the user's own."""

import copy
import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SEModule
from timm.models import save_for_hf

import timm_eca
from conftest import randomize_
from timm_eca import attn_modules

BACKBONES = ["resnet18", "mobilenetv2_050"]
PLAIN_LINE = "The checkpoint has no attention weights: the {} 'eca' layers keep their initial values."


def load_pretrained(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def load_checkpoint(name, path, **kwargs):
    return timm.create_model(name, checkpoint_path=str(path), **kwargs)


def load_state_dict(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    model.load_state_dict(torch.load(path))
    return model


WAYS = [load_pretrained, load_checkpoint, load_state_dict]


@pytest.fixture
def make(tmp_path):
    def make(name, edit=None, **kwargs):
        model = randomize_(timm.create_model(name, **kwargs)).eval()
        weights = model.state_dict()
        path = tmp_path / "weights.pth"
        torch.save(edit(dict(weights)) if edit else weights, path)
        return model, path

    return make


def without(*endings):
    return lambda weights: {k: v for k, v in weights.items() if not k.endswith(endings)}


@pytest.mark.parametrize("load", WAYS)
@pytest.mark.parametrize("name", BACKBONES)
class TestWaysIn:
    def test_plain_backbone(self, load, name, make, caplog):
        plain, path = make(name)
        with caplog.at_level(logging.INFO, "timm_eca"):
            torch.manual_seed(3)
            model = load(name, path, attn_layer="eca")
        torch.manual_seed(3)
        initial = timm.create_model(name, attn_layer="eca")
        for key, value in model.state_dict().items():
            origin = plain if key in plain.state_dict() else initial
            assert torch.equal(value, origin.state_dict()[key]), key
        count = len(attn_modules(model))
        assert [r.message for r in caplog.records if r.name == "timm_eca.checkpoint"] == [PLAIN_LINE.format(count)]

    def test_plain_backbone_identity(self, load, name, make, images):
        plain, path = make(name)
        model = load(name, path, attn_layer="eca", attn_init="identity").eval()
        assert torch.equal(model(images), plain(images))

    @pytest.mark.parametrize("init", ["default", "identity"])
    def test_attention_model(self, load, name, make, images, caplog, init):
        trained, path = make(name, attn_layer="eca")
        with caplog.at_level(logging.INFO, "timm_eca"):
            model = load(name, path, attn_layer="eca", attn_init=init).eval()
        assert torch.equal(model(images), trained(images))
        assert not [r for r in caplog.records if r.name == "timm_eca.checkpoint"]

    def test_one_key_missing(self, load, name, make):
        lost = "layer1.0.se.conv.weight" if name == "resnet18" else "blocks.1.0.attn_last.conv.weight"
        _, path = make(name, without(lost), attn_layer="eca")
        with pytest.raises(ValueError, match=rf"lacks {lost}\. Accepted: all of them, or none"):
            load(name, path, attn_layer="eca")


class TestLenientLoading:
    """timm turns strict loading off for another number of classes and for feature extraction."""

    @pytest.mark.parametrize("lenient", [{"num_classes": 5}, {"features_only": True}, {"num_classes": 0}])
    @pytest.mark.parametrize("name", BACKBONES)
    def test_incomplete(self, name, lenient, make):
        lost = "layer2.1.se.conv.weight" if name == "resnet18" else "blocks.3.1.attn_last.conv.weight"
        _, path = make(name, without(lost), attn_layer="eca")
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            load_pretrained(name, path, attn_layer="eca", **lenient)

    @pytest.mark.parametrize("lenient", [{"num_classes": 5}, {"features_only": True}, {"in_chans": 1}])
    @pytest.mark.parametrize("name", BACKBONES)
    def test_complete_and_plain(self, name, lenient, make):
        trained, path = make(name, attn_layer="eca")
        model = load_pretrained(name, path, attn_layer="eca", **lenient)
        for key, layer in attn_modules(model).items():
            assert torch.equal(layer.conv.weight, trained.get_submodule(key).conv.weight)
        _, path = make(name)
        load_pretrained(name, path, attn_layer="eca", attn_init="identity", **lenient)

    @pytest.mark.parametrize("name", BACKBONES)
    def test_features_identity(self, name, make, images):
        plain, path = make(name)
        model = load_pretrained(name, path, attn_layer="eca", attn_init="identity", features_only=True).eval()
        for ours, theirs in zip(model(images), plain.forward_intermediates(images, intermediates_only=True)):
            assert torch.equal(ours, theirs)

    def test_wrong_kernel_size(self, make):
        _, path = make("resnet18", attn_layer="eca", attn_kwargs={"kernel_size": 9})
        with pytest.raises(RuntimeError, match=r"size mismatch for layer1.0.se.conv.weight"):
            load_pretrained("resnet18", path, attn_layer="eca", num_classes=5)

    def test_more_stages_than_the_model(self, make):
        _, path = make("resnet18", attn_layer="eca")
        with pytest.raises(ValueError, match=r"4 attention weights outside attn_stages=\(3, 4\): layer1.0.se.conv"):
            load_pretrained("resnet18", path, attn_layer="eca", attn_stages=(3, 4), num_classes=5)

    def test_fewer_stages_than_the_model(self, make):
        _, path = make("resnet18", attn_layer="eca", attn_stages=(3, 4))
        with pytest.raises(ValueError, match=r"4 of 8 attention weights and lacks layer1.0.se.conv.weight"):
            load_pretrained("resnet18", path, attn_layer="eca", num_classes=5)


class TestReplacedSqueezeAndExcitation:
    @pytest.mark.parametrize("load", WAYS)
    def test_its_keys_are_dropped_once(self, load, make, caplog):
        plain, path = make("seresnet18")
        with caplog.at_level(logging.INFO, "timm_eca"):
            model = load("seresnet18", path, attn_layer="eca", attn_stages=(3, 4))
        for key, value in model.state_dict().items():
            if key in plain.state_dict():
                assert torch.equal(value, plain.state_dict()[key]), key
        assert "layer1.0.se.fc1.weight" in model.state_dict()
        lines = [r.message for r in caplog.records if r.name == "timm_eca.checkpoint"]
        assert len(lines) == 2
        assert lines[0].startswith("Dropped 16 weights of modules that attention replaced: layer3.0.se.fc1.bias")
        assert lines[1] == PLAIN_LINE.format(4)

    @pytest.mark.parametrize(
        ("name", "layer", "arguments"),
        [
            ("seresnet18", "se", {"rd_ratio": 1 / 8}),
            ("seresnet18", "scse", {}),
            ("seresnet18", "ge_theta_plus", {}),
            ("ecaresnet26t", "eca", {"kernel_size": 7}),
            ("gcresnet33ts", "gc", {"rd_ratio": 1 / 4}),
            ("regnety_002", "se", {"rd_ratio": 1 / 2}),
            ("seresnet33ts", "se", {"rd_ratio": 1 / 8}),
        ],
    )
    def test_its_keys_that_the_layer_has_too(self, name, layer, arguments):
        """Weights of the old module are nothing to the new one, also where some have its names and shapes."""
        plain = randomize_(timm.create_model(name)).state_dict()
        model = timm.create_model(name, attn_layer=layer, attn_kwargs=arguments)
        initial = copy.deepcopy(model.state_dict())
        model.load_state_dict(plain)
        layers = tuple(f"{path}." for path in attn_modules(model))
        assert layers
        for key, value in model.state_dict().items():
            assert torch.equal(value, (initial if key.startswith(layers) else plain)[key]), key
        trained = randomize_(timm.create_model(name, attn_layer=layer, attn_kwargs=arguments)).state_dict()
        model.load_state_dict(trained)
        assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())

    def test_a_layer_with_all_its_tensors_and_more(self):
        class Signed(SEModule):
            def __init__(self, channels):
                super().__init__(channels)
                self.sign = torch.nn.Parameter(torch.ones(channels))

        model = timm.create_model("seresnet18", attn_layer=Signed)
        initial = copy.deepcopy(model.layer1[0].se.state_dict())
        model.load_state_dict(timm.create_model("seresnet18").state_dict())
        assert all(torch.equal(value, initial[key]) for key, value in model.layer1[0].se.state_dict().items())
        incomplete = without("layer1.0.se.sign")(model.state_dict())
        with pytest.raises(ValueError, match=r"39 of 40 attention weights and lacks layer1.0.se.sign"):
            model.load_state_dict(incomplete)

    def test_foreign_keys_still_raise(self, make):
        _, path = make("seresnet18", lambda w: {**w, "layer3.0.other.weight": torch.zeros(1)})
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*layer3.0.other.weight"):
            load_pretrained("seresnet18", path, attn_layer="eca")

    def test_timm_eca_checkpoint(self, make):
        theirs, path = make("ecaresnet26t")
        model = load_pretrained("ecaresnet26t", path, attn_layer="eca")
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in model.state_dict().items())


class TestUsersOwnLoading:
    def test_callers_tensors_stay(self, make):
        plain, _ = make("resnet18")
        weights = plain.state_dict()
        before = copy.deepcopy(weights)
        timm.create_model("resnet18", attn_layer="eca", attn_init="identity").load_state_dict(weights)
        assert weights.keys() == before.keys()
        assert all(torch.equal(weights[k], before[k]) for k in before)

    def test_within_a_larger_module(self, make, images):
        plain, _ = make("resnet18")
        parent = torch.nn.ModuleDict(
            {"backbone": timm.create_model("resnet18", attn_layer="eca", attn_init="identity")}
        )
        parent.load_state_dict({f"backbone.{k}": v for k, v in plain.state_dict().items()})
        assert torch.equal(parent["backbone"].eval()(images), plain(images))
        attention = {k: v for k, v in parent.state_dict().items() if k != "backbone.layer1.0.se.conv.weight"}
        with pytest.raises(ValueError, match=r"lacks backbone.layer1.0.se.conv.weight"):
            parent.load_state_dict(attention, strict=False)

    def test_head_alone_keeps_the_rest(self, images):
        """A lenient load of a few weights is no plain backbone: trained attention stays."""
        model = randomize_(timm.create_model("resnet18", attn_layer="eca", attn_init="identity"))
        for layer in attn_modules(model).values():
            torch.nn.init.normal_(layer.conv.weight)
        before = copy.deepcopy(model.state_dict())
        model.load_state_dict({"fc.bias": torch.ones(1000)}, strict=False)
        for key, value in model.state_dict().items():
            assert torch.equal(value, torch.ones(1000) if key == "fc.bias" else before[key]), key

    def test_lenient_identity_without_a_norms_weight(self, make):
        plain, _ = make("resnet18")
        model = timm.create_model("resnet18", attn_layer="eca", attn_init="identity")
        lost = "layer1.0.bn2.bias"
        found = model.load_state_dict(without(lost)(plain.state_dict()), strict=False)
        assert found.missing_keys == [lost]
        assert torch.equal(model.layer1[0].bn2.weight, 2 * plain.layer1[0].bn2.weight)

    @pytest.mark.parametrize("arguments", [{}, {"attn_init": "identity"}])
    def test_assigned_to_a_model_without_values(self, arguments, make):
        """There are no initial values to keep on the meta device, and none are made up."""
        plain, _ = make("resnet18")
        model = timm.create_model("resnet18", attn_layer="eca", device="meta", **arguments)
        with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.0\.se\.conv\.weight"):
            model.load_state_dict(plain.state_dict(), assign=True)
        found = model.load_state_dict(plain.state_dict(), assign=True, strict=False)
        assert sorted(found.missing_keys) == [f"layer{i}.{j}.se.conv.weight" for i in (1, 2, 3, 4) for j in (0, 1)]

    def test_layer_without_weights(self, make):
        plain, path = make("resnet18")
        model = load_pretrained("resnet18", path, attn_layer=lambda channels: torch.nn.Identity())
        assert model.state_dict().keys() == plain.state_dict().keys()


class TestHubFormat:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("resnet18", {"attn_layer": "eca"}),
            ("resnet18", {"attn_layer": "eca", "attn_stages": (3, 4), "attn_kwargs": {"kernel_size": 9}}),
            ("resnet18", {"attn_layer": "cbam", "attn_where": "end"}),
            ("mobilenetv2_050", {"attn_layer": "eca", "attn_init": "identity", "num_classes": 3}),
            ("eca_resnet18", {"kernel_sizes": "adaptive", "in_chans": 1}),
            ("eca_mobilenetv2_050", {}),
        ],
    )
    def test_local_dir(self, name, arguments, tmp_path):
        model = randomize_(timm.create_model(name, **arguments)).eval()
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
        assert torch.equal(loaded(x), model(x))
        assert loaded.attn_spec == model.attn_spec

    def test_added_attention_is_saved_too(self, tmp_path, images):
        model = timm_eca.add_attn_(timm.create_model("resnet18"), "eca", attn_stages=(4,)).eval()
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(images), model(images))

    def test_damaged_folder(self, tmp_path):
        model = timm.create_model("resnet18", attn_layer="eca")
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        save_file(without("layer1.0.se.conv.weight")(model.state_dict()), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"lacks layer1.0.se.conv.weight"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)

    def test_hf_hub_from_a_warm_cache(self, tmp_path, run_python):
        """The real client, offline: the cache holds the repository as a download leaves it."""
        model = timm.create_model("resnet18", attn_layer="eca", attn_stages=(4,))
        cache = tmp_path / "home" / "hub" / "models--lab--eca-net"
        snapshot = cache / "snapshots" / ("0" * 39 + "1")
        save_for_hf(model, str(snapshot), safe_serialization=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(snapshot.name)
        torch.save(model.state_dict(), tmp_path / "expected.pth")
        run_python(
            "import timm, torch, timm_eca\n"
            "model = timm.create_model('hf-hub:lab/eca-net', pretrained=True)\n"
            "expected = torch.load('expected.pth')\n"
            "assert model.state_dict().keys() == expected.keys()\n"
            "assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())\n",
            HF_HUB_OFFLINE="1",
            HF_HOME=str(tmp_path / "home"),
        )

    def test_config_is_plain_json(self, tmp_path):
        model = timm.create_model("resnet18", attn_layer="eca", attn_stages=(3, 4), attn_init="identity")
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        arguments = json.loads(Path(tmp_path, "config.json").read_text())["model_args"]
        assert {k: v for k, v in arguments.items() if k.startswith("attn")} == {
            "attn_layer": "eca",
            "attn_stages": [3, 4],
            "attn_init": "identity",
        }


def test_round_trip_where_timms_own_layer_was_another():
    """ecaresnet26t has ECA of other kernel sizes under the same keys: whose the weights are, their shapes tell."""
    first, second = (timm.create_model("ecaresnet26t", attn_layer="eca", attn_kwargs={"kernel_size": 9}) for _ in "12")
    second.load_state_dict(first.state_dict())
    for path, layer in attn_modules(first).items():
        assert torch.equal(layer.conv.weight, second.get_submodule(path).conv.weight)

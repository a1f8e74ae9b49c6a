import pytest
import timm
import torch
from timm.layers import EcaModule

import timm_eca
from conftest import randomize_
from timm_eca import attn_modules
from timm_eca.models import ENTRYPOINTS

NAMES = [entrypoint.__name__ for entrypoint in ENTRYPOINTS]
SMALL = ["eca_resnet18", "eca_resnet50", "eca_resnext50_32x4d", "eca_mobilenetv2_050"]

# Released models: kernel size per stage, blocks per stage, ECA weights, parameters. Sizes and parameters are the
# official repository's (README and code); the ECA weights are the sum of kernel size times blocks.
RESNETS = {
    "eca_resnet18": ((3, 5, 7, 7), (2, 2, 2, 2), 44, 11_689_556),
    "eca_resnet34": ((3, 3, 5, 7), (3, 4, 6, 3), 72, 21_797_744),
    "eca_resnet50": ((3, 5, 5, 7), (3, 4, 6, 3), 80, 25_557_112),
    "eca_resnet101": ((3, 3, 5, 7), (3, 4, 23, 3), 157, 44_549_317),
    "eca_resnet152": ((3, 3, 5, 7), (3, 8, 36, 3), 234, 60_193_042),
}


def kernel_sizes(model):
    return [layer.conv.kernel_size[0] for layer in attn_modules(model).values()]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def attn_parameters(model):
    return sum(parameters(layer) for layer in attn_modules(model).values())


class TestFacts:
    @pytest.mark.parametrize("name", RESNETS)
    def test_released_resnets(self, name):
        preset, depths, attention, total = RESNETS[name]
        model = timm.create_model(name, device="meta")
        assert kernel_sizes(model) == [k for k, depth in zip(preset, depths) for _ in range(depth)]
        assert (attn_parameters(model), parameters(model)) == (attention, total)

    def test_released_mobilenetv2(self):
        model = timm.create_model("eca_mobilenetv2_100", device="meta")
        assert kernel_sizes(model) == [1] * 10 + [3] * 7
        assert (attn_parameters(model), parameters(model)) == (31, 3_504_903)

    @pytest.mark.parametrize("name", ["eca_mobilenetv2_050", "eca_mobilenetv2_140"])
    def test_width_multipliers_share_the_preset(self, name):
        assert kernel_sizes(timm.create_model(name, device="meta")) == [1] * 10 + [3] * 7

    @pytest.mark.parametrize("name", ["eca_resnet50", "eca_resnext50_32x4d"])
    def test_adaptive(self, name):
        model = timm.create_model(name, kernel_sizes="adaptive", device="meta")
        assert kernel_sizes(model) == [5] * 3 + [5] * 4 + [5] * 6 + [7] * 3
        assert attn_parameters(model) == 86

    @pytest.mark.parametrize("name", NAMES)
    def test_all_norms_start_at_one(self, name):
        model = timm.create_model(name)
        assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


class TestKernelSizes:
    def test_given(self):
        assert set(kernel_sizes(timm.create_model("eca_resnet18", kernel_sizes=9, device="meta"))) == {9}
        model = timm.create_model("eca_resnet18", kernel_sizes=[1, 3, 5, 7], device="meta")
        assert kernel_sizes(model) == [1, 1, 3, 3, 5, 5, 7, 7]
        model = timm.create_model("eca_mobilenetv2_050", kernel_sizes=(1, 1, 1, 1, 1, 1, 5), device="meta")
        assert kernel_sizes(model) == [1] * 16 + [5]
        model = timm.create_model("eca_inception_v3", kernel_sizes=(3, 5, 9), device="meta")  # stages 5 to 7 carry it
        assert kernel_sizes(model) == [3] * 3 + [5] * 4 + [9] * 2

    @pytest.mark.parametrize("value", [(3, 5), "adaptiv", 3.0, (3, 5, 7, 7, 7)])
    def test_refused(self, value):
        message = r"kernel_sizes must be 'adaptive', an odd number, or 4 odd numbers, one per stage \(1 to 4\), got"
        with pytest.raises(ValueError, match=message):
            timm.create_model("eca_resnet18", kernel_sizes=value)

    @pytest.mark.parametrize("value", [4, 0, (3, 4, 5, 7)])
    def test_even(self, value):
        with pytest.raises(ValueError, match="kernel_size must be an odd positive integer"):
            timm.create_model("eca_resnet18", kernel_sizes=value)

    def test_not_by_another_name(self):
        with pytest.raises(ValueError, match=r"without kernel_size.*use kernel_sizes"):
            timm.create_model("eca_resnet18", attn_kwargs={"kernel_size": 3})

    def test_other_arguments_of_the_layer(self):
        model = timm.create_model("eca_resnet18", attn_kwargs={"gate_layer": "hard_sigmoid"}, device="meta")
        assert {type(m.gate).__name__ for m in attn_modules(model).values()} == {"Hardsigmoid"}
        assert kernel_sizes(model) == [3, 3, 5, 5, 7, 7, 7, 7]

    def test_no_other_layer(self):
        with pytest.raises(ValueError, match="eca_resnet18 carries 'eca'; for attn_layer='se' create 'resnet18'"):
            timm.create_model("eca_resnet18", attn_layer="se")


class TestRegistration:
    def test_listed(self):
        assert set(NAMES) <= set(timm.list_models("eca_*"))
        assert [f"{name}.ecanet_in1k" for name in NAMES] == [n for n in NAMES_WITH_TAG if n in timm.list_pretrained()]

    @pytest.mark.parametrize("name", NAMES)
    def test_cfg(self, name):
        for model_name in (name, f"{name}.ecanet_in1k"):
            cfg = timm.get_pretrained_cfg(model_name)
            assert cfg.hf_hub_id == f"timm-eca/{name}.ecanet_in1k"
            assert (cfg.architecture, cfg.tag) == (name, "ecanet_in1k")
            size = 299 if "inception" in name else 224
            assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, size, size), 0.875, "bilinear")
            assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            assert (cfg.license, cfg.paper_ids, cfg.num_classes) == ("mit", "arXiv:1910.03151", 1000)

    @pytest.mark.parametrize("name", NAMES)
    def test_model_has_its_own_cfg(self, name):
        model = timm.create_model(f"{name}.ecanet_in1k", device="meta")
        assert model.pretrained_cfg["architecture"] == name
        assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
        assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 1000

    def test_wrong_tag(self):
        with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(a1_in1k\) for eca_resnet50"):
            timm.create_model("eca_resnet50.a1_in1k")

    def test_not_among_timms_own(self):
        assert not set(NAMES) & set(timm.list_models(module="resnet"))
        assert set(timm.list_models(module="eca_resnet")) == set(RESNETS)


NAMES_WITH_TAG = [f"{name}.ecanet_in1k" for name in NAMES]


@pytest.mark.parametrize("name", SMALL)
class TestAsTimmsOwn:
    def test_features(self, name, images):
        model = timm.create_model(name).eval()
        features = model.forward_features(images)
        assert features.shape == (2, model.num_features, 2, 2)
        assert torch.equal(model.forward_head(features), model(images))
        backbone = timm.create_model(name, features_only=True, out_indices=(1, 3))
        assert [f.shape[1] for f in backbone(images)] == backbone.feature_info.channels()

    def test_classifier(self, name, images):
        model = timm.create_model(name)
        assert model.get_classifier().out_features == 1000
        model.reset_classifier(7)
        assert model(images).shape == (2, 7)
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)

    def test_output_stride(self, name, images):
        model = timm.create_model(name, output_stride=8)
        assert model.forward_features(images).shape[-2:] == (8, 8)

    def test_checkpointed_gradients(self, name, images):
        torch.manual_seed(0)
        model = randomize_(timm.create_model(name)).eval()  # eval: norms and their statistics stay as they are
        model(images).square().mean().backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        model.set_grad_checkpointing()
        model(images).square().mean().backward()
        assert len(attn_modules(model)) > 0
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[key])

    def test_pretrained_by_overlay(self, name, images):
        torch.manual_seed(0)
        model = randomize_(timm.create_model(name)).eval()
        again = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(model.state_dict())}
        ).eval()
        assert torch.equal(again(images), model(images))


class TestKeys:
    def test_resnet_keys_are_timms(self):
        ours = timm.create_model("eca_resnet50", device="meta")
        plain = timm.create_model("resnet50", device="meta")
        blocks = [f"layer{i}.{j}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth)]
        assert set(ours.state_dict()) - set(plain.state_dict()) == {f"{b}.se.conv.weight" for b in blocks}
        assert set(plain.state_dict()) <= set(ours.state_dict())

    def test_adaptive_weights_load_in_plain_timm(self, run_python, tmp_path):
        torch.manual_seed(0)
        model = randomize_(timm.create_model("eca_resnet50", kernel_sizes="adaptive", fused=False)).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.save({"weights": model.state_dict(), "x": x, "logits": model(x)}, tmp_path / "saved.pth")
        run_python(
            "import sys, timm, torch\n"
            "saved = torch.load('saved.pth')\n"
            "model = timm.create_model('resnet50', block_args=dict(attn_layer='eca')).eval()\n"
            "model.load_state_dict(saved['weights'])\n"
            "torch.testing.assert_close(model(saved['x']), saved['logits'], rtol=1e-6, atol=1e-6)\n"
            "assert 'timm_eca' not in sys.modules\n"
        )

    def test_timms_weights_load_here(self):
        theirs = timm.create_model("resnet26", block_args={"attn_layer": EcaModule})
        timm_eca.add_attn_(timm.create_model("resnet26")).load_state_dict(theirs.state_dict())


class TestOncePerStage:
    """Under attn_where='stage' the stages that count are timm's feature stages."""

    def test_sizes_of_other_stages(self):
        with pytest.raises(ValueError, match=r"kernel_sizes of eca_mobilenetv2_050 are for the stages 1 to 7 of its"):
            timm.create_model("eca_mobilenetv2_050", attn_where="stage", device="meta")

    @pytest.mark.parametrize(
        ("name", "asked", "count"),
        [
            ("eca_mobilenetv2_050", {"kernel_sizes": 5}, 5),
            ("eca_inception_v3", {}, 3),
            ("eca_resnet50", {}, 4),
        ],
    )
    def test_one_size(self, name, asked, count):
        model = timm.create_model(name, attn_where="stage", device="meta", **asked)
        assert len(model.attn_sites) == count

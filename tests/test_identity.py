"""A start from a plain backbone's function, bit for bit."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn

from conftest import randomize_
from timm_eca import add_attn_, attn_modules


class TestIdentity:
    @pytest.mark.parametrize(
        "name", ["resnet18", "resnet26", "resnext50_32x4d", "resnet26t", "resnet50_gn", "mobilenetv2_050"]
    )
    def test_same_function_bit_for_bit(self, name, images):
        torch.manual_seed(0)
        plain = randomize_(timm.create_model(name)).eval()
        model = add_attn_(copy.deepcopy(plain), "eca", attn_init="identity")
        assert len(attn_modules(model)) > 0
        assert torch.equal(model(images), plain(images))
        created = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": copy.deepcopy(plain.state_dict())},
            attn_layer="eca",
            attn_init="identity",
        )
        assert torch.equal(created.eval()(images), plain(images))

    def test_a_cfg_with_custom_load(self, images):
        """timm heeds it for files and URLs; from elsewhere the weights come as they always do."""
        plain = timm.create_model("resnetv2_18", zero_init_last=False).eval()
        weights = {"state_dict": copy.deepcopy(plain.state_dict()), "custom_load": True}
        identity = {"attn_layer": "eca", "attn_init": "identity"}
        model = timm.create_model("resnetv2_18", pretrained=True, pretrained_cfg_overlay=weights, **identity)
        assert torch.equal(model.eval()(images), plain(images))
        assert len(model._load_state_dict_pre_hooks) == 1

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_trains_from_there(self, name, images):
        torch.manual_seed(0)
        model = add_attn_(randomize_(timm.create_model(name)), "eca", attn_init="identity")
        model(images).square().mean().backward()
        for layer in attn_modules(model).values():
            assert (layer.conv.weight.grad != 0).all()

    def test_training_mode_too(self, images):
        plain = randomize_(timm.create_model("resnet18"))
        model = add_attn_(copy.deepcopy(plain), "eca", attn_init="identity")
        assert torch.equal(model.train()(images), plain.train()(images))

    def test_is_ordinary_weights(self, images):
        """What an identity start leaves is a plain ECA network: its weights give the same function elsewhere."""
        model = add_attn_(randomize_(timm.create_model("resnet18")), "eca", attn_init="identity").eval()
        other = timm.create_model("resnet18", attn_layer="eca").eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))

    def test_needs_an_affine_norm(self):
        norm = functools.partial(nn.BatchNorm2d, affine=False)
        model = timm.create_model("resnet18", norm_layer=norm, zero_init_last=False)
        before = list(model.named_modules())
        with pytest.raises(
            ValueError, match=r"attn_init='identity' needs norm weights that scale what layer1.0.se gates"
        ):
            add_attn_(model, attn_init="identity")
        assert list(model.named_modules()) == before

    @pytest.mark.parametrize(
        "norm",
        [
            nn.utils.parametrizations.weight_norm,
            functools.partial(nn.utils.prune.random_unstructured, name="weight", amount=0.3),
            pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        ],
        ids=["parametrized", "pruned", "weight_norm"],
    )
    @pytest.mark.parametrize("name", ["densenet121", "ghostnet_050"])
    def test_weights_that_are_computed(self, name, norm, images):
        """To scale them would be to scale what the next call computes anew."""
        torch.manual_seed(0)
        model = randomize_(timm.create_model(name)).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                norm(module)
        with torch.no_grad():
            expected, plain = model(images), {key: value.clone() for key, value in model.state_dict().items()}
            add_attn_(model, "eca", attn_init="identity", attn_where="add")
            assert torch.equal(model(images), expected)
            for layer in attn_modules(model).values():
                nn.init.normal_(layer.conv.weight)
            model.load_state_dict(plain)
            assert torch.equal(model(images), expected)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_frozen_norms(self, name, images):
        """Their weights are buffers, and scale the branch as ever."""
        model = randomize_(timm.create_model(name)).eval()
        timm.utils.freeze(model)
        expected = model(images)
        add_attn_(model, "eca", attn_init="identity")
        assert all(site.scales for site in model.attn_sites)
        assert torch.equal(model(images), expected)

    def test_refuses_to_replace(self):
        with pytest.raises(
            ValueError, match=r"layer1.0.se squeeze-and-excitation \(SEModule\) would go.*attn_where='add'"
        ):
            timm.create_model("seresnet18", attn_layer="eca", attn_init="identity")
        with pytest.raises(ValueError, match=r"blocks.0.0.se squeeze-and-excitation .* would go.*attn_where='add'"):
            timm.create_model("efficientnet_b0", attn_layer="eca", attn_where="end", attn_init="identity")

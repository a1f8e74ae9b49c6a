"""What is loaded into timm's feature extractors: they take a model apart, and are guarded all the same."""

import pytest
import timm
import torch

from conftest import randomize_

APART = [("resnet18", "list"), ("resnet18", "dict"), ("resnet18", "fx"), ("convnext_atto", "hook")]


class TestFeatureWrappers:
    """timm's feature extractors take a model apart; what is loaded into them is seen all the same."""

    @staticmethod
    def features(name, kind, **kwargs):
        return randomize_(timm.create_model(name, features_only=True, feature_cls=kind, **kwargs)).eval()

    @staticmethod
    def same(model, other, images):
        ours, theirs = ([*(f.values() if isinstance(f, dict) else f)] for f in (model(images), other(images)))
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(("name", "kind"), APART)
    def test_plain_features_identity(self, name, kind, strict, images):
        plain = self.features(name, kind)
        model = self.features(name, kind, attn_layer="eca", attn_init="identity")
        attention = [key for key in model.state_dict() if key not in plain.state_dict()]
        assert attention
        for key in attention:
            model.state_dict()[key].fill_(0.3)  # also anew, after training
        model.load_state_dict(plain.state_dict(), strict=strict)
        assert self.same(model, plain, images)

    @pytest.mark.parametrize(("name", "kind"), APART)
    def test_incomplete(self, name, kind):
        weights = self.features(name, kind, attn_layer="eca").state_dict()
        lost = next(key for key in weights if key.endswith(("se.conv.weight", "attn_last.conv.weight")))
        model = self.features(name, kind, attn_layer="eca")
        model.load_state_dict(weights)
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            model.load_state_dict({k: v for k, v in weights.items() if k != lost}, strict=False)

    @pytest.mark.parametrize("kind", ["list", "dict"])
    def test_whole_model(self, kind, images):
        whole = randomize_(timm.create_model("resnet18"))
        plain = self.features("resnet18", kind)
        plain.load_state_dict(whole.state_dict(), strict=False)
        model = self.features("resnet18", kind, attn_layer="eca", attn_init="identity")
        model.load_state_dict(whole.state_dict(), strict=False)
        assert self.same(model, plain, images)

    def test_other_stages(self):
        weights = self.features("resnet18", "list", attn_layer="eca").state_dict()
        model = self.features("resnet18", "list", attn_layer="eca", attn_stages=(3, 4))
        with pytest.raises(ValueError, match=r"4 attention weights outside attn_stages=\(3, 4\): layer1.0.se.conv"):
            model.load_state_dict(weights, strict=False)

    @pytest.mark.parametrize("name", ["seresnet18", "seresnet33ts"])
    def test_replaced_squeeze_and_excitation(self, name):
        plain = self.features(name, "list")
        model = self.features(name, "list", attn_layer="eca")
        model.load_state_dict(plain.state_dict())
        assert {key for key in plain.state_dict() if key not in model.state_dict()}

    def test_its_sites_are_where_they_are_said_to_be(self):
        model = self.features("resnet18", "hook", attn_layer="eca", attn_init="identity")
        for site in model.attn_sites:
            assert model.get_submodule(site.like).num_features == site.channels
            assert all(path in model.state_dict() for path in site.scales)

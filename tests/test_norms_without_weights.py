"""Attention beside norms that have no weights: its place is told by other tensors."""

import functools

import pytest
import timm
import torch
from torch import nn

from timm_eca import attn_modules

WITHOUT_WEIGHTS = [nn.InstanceNorm2d, functools.partial(nn.BatchNorm2d, affine=False), nn.Identity]


@pytest.mark.parametrize("norm", WITHOUT_WEIGHTS, ids=["instance", "not affine", "identity"])
class TestNormsWithoutWeights:
    @pytest.mark.parametrize("where", ["auto", "add", "stage"])
    def test_add(self, norm, where, images):
        model = timm.create_model("resnet18", norm_layer=norm, dtype=torch.float64, attn_layer="eca", attn_where=where)
        assert [site.channels for site in model.attn_sites][::7] == ([64] if where == "stage" else [64, 512])
        assert all(layer.conv.weight.dtype == torch.float64 for layer in attn_modules(model).values())
        assert model(images.double()).shape == (2, 1000)

    def test_identity(self, norm, images):
        """Nothing scales the branch but a gain, also when plain weights are loaded."""
        plain = timm.create_model("seresnet18", norm_layer=norm).eval()
        arguments = {"attn_layer": "eca", "attn_where": "add", "attn_init": "identity"}
        model = timm.create_model("seresnet18", norm_layer=norm, **arguments).eval()
        for layer in attn_modules(model).values():
            nn.init.normal_(layer.conv.weight)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(model(images), plain(images))

"""Layers other than ECA: timm's own of the same shape, and a user's class, over several kinds of blocks."""

import pytest
import timm
import torch
from torch import nn

from family_names import image
from timm_eca import attn_modules
from timm_eca.layers.timm_layers import TIMM_ATTNS

# Slot, gate, NHWC, cat and slice, timm's own placement, no residuals, cells; all at 64 pixels.
BACKBONES = [
    "seresnet18",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "convnext_atto",
    "mambaout_femto",
    "regnety_002",
    "ghostnet_050",
    "gernet_s",
    "nf_resnet26",
    "densenet121",
    "selecsls42",
]
KWARGS = {"bat": {"block_size": 1}}  # whole blocks of a map that is one pixel at the end


class ChannelScale(nn.Module):
    """A user's layer, with nothing but the first argument."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


def check(name, layer, where):
    model = timm.create_model(name, attn_layer=layer, attn_where=where, attn_kwargs=KWARGS.get(layer)).eval()
    ran = set()
    for path, module in attn_modules(model).items():
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
    with torch.no_grad():
        assert model(image(name, batch=1)).shape == (1, 1000)
    assert ran == attn_modules(model).keys()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("layer", ["se", "cbam", "gc", "ge", "coord", ChannelScale])
@pytest.mark.parametrize("where", ["auto", "end", "add", "stage"])
def test_any_layer(name, layer, where):
    check(name, layer, where)


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_atto", "gernet_s"])
@pytest.mark.parametrize("layer", sorted({*TIMM_ATTNS} - {"se", "cbam", "gc", "coord"}))
def test_timms_layers(name, layer):
    check(name, layer, "auto")


class TestPruned:
    """timm narrows a pruned model after construction; the layers come after that, as wide as what is left."""

    @pytest.mark.parametrize("name", ["efficientnet_b1_pruned", "ecaresnet50d_pruned"])
    @pytest.mark.parametrize("layer", ["eca", "se", "cbam", ChannelScale])
    @pytest.mark.parametrize("where", ["auto", "end", "add", "stage"])
    def test_any_layer(self, name, layer, where):
        model = timm.create_model(name, attn_layer=layer, attn_where=where).eval()
        widths = {}
        for path, module in attn_modules(model).items():
            module.register_forward_pre_hook(lambda _, x, path=path: widths.update({path: x[0].shape[1]}))
        with torch.no_grad():
            assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
        assert widths == {site.path: site.channels for site in model.attn_sites}

    @pytest.mark.parametrize("features_only", [False, True])
    def test_plain_weights(self, features_only):
        plain = timm.create_model("efficientnet_b1_pruned").eval()
        arguments = {
            "pretrained": True,
            "pretrained_cfg_overlay": {"state_dict": plain.state_dict(), "file": None},
            "attn_layer": "eca",
            "attn_where": "add",
            "attn_init": "identity",
            "features_only": features_only,
        }
        model = timm.create_model("efficientnet_b1_pruned", **arguments).eval()
        x = torch.randn(1, 3, 64, 64)
        expected = plain.forward_intermediates(x, intermediates_only=True) if features_only else [plain(x)]
        outputs = model(x) if features_only else [model(x)]
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))

    def test_weights_of_timms_own_attention(self):
        """Their sizes are those for the widths before pruning."""
        theirs = timm.create_model("ecaresnet50d_pruned").eval()
        weights = {"state_dict": theirs.state_dict(), "file": None}
        model = timm.create_model(
            "ecaresnet50d_pruned", attn_layer="eca", pretrained=True, pretrained_cfg_overlay=weights, fused=False
        )
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(model.eval()(x), theirs(x))

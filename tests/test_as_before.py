"""Calls that timm accepts without this package mean the same with it."""

import copy

import pytest
import timm
import torch
from timm.layers import EcaModule

import timm_eca
from timm_eca import EcaLayer


def shapes(model):
    return {key: value.shape for key, value in model.state_dict().items()}


class TestAsBefore:
    """Calls that timm accepts without this package mean the same with it."""

    @pytest.mark.usefixtures("_timm_without_doors")
    @pytest.mark.parametrize(
        ("name", "asked"),
        [
            ("seresnet33ts", {"attn_kwargs": {"rd_ratio": 1 / 8}}),
            ("nf_seresnet50", {"attn_kwargs": {"rd_ratio": 1 / 8}}),
            ("dm_nfnet_f0", {"attn_kwargs": {}}),
            ("eca_nfnet_l0", {"attn_kwargs": {"use_mlp": True, "rd_channels": 4}}),
            ("seresnet33ts", {"attn_layer": ""}),
            ("dm_nfnet_f0", {"attn_layer": "se"}),
            ("dm_nfnet_f0", {"attn_layer": "se", "attn_kwargs": {}}),
            ("nfnet_f0", {"attn_layer": "gc"}),
            ("regnetz_b16", {"attn_layer": "se"}),
            ("haloregnetz_b", {"attn_layer": "gc"}),
            ("eca_resnext26ts", {"attn_layer": "eca", "attn_kwargs": {"use_mlp": True, "rd_channels": 4}}),
        ],
    )
    def test_shapes(self, name, asked):
        theirs = timm.create_model(name, device="meta", **asked)
        timm_eca.install()
        assert shapes(timm.create_model(name, device="meta", **asked)) == shapes(theirs)

    def test_no_attention_where_the_constructor_knows_it(self):
        model = timm.models.seresnet33ts(attn_layer=None, attn_kwargs=None, device="meta")
        assert not any(isinstance(m, timm.layers.SEModule) for m in model.modules())

    def test_arguments_of_the_configuration_that_do_not_fit(self):
        """timm fails: its block_size is that of the layer which gives way."""
        model = timm.create_model("bat_resnext26ts", attn_layer="eca", device="meta")
        assert {type(m) for m in timm_eca.attn_modules(model).values()} == {EcaLayer}

    def test_mlp_of_timms_eca(self):
        layer = timm.layers.create_attn("eca", 64, use_mlp=True, act_layer=torch.nn.SiLU, gate_layer="hard_sigmoid")
        theirs = EcaModule(64, use_mlp=True, act_layer=torch.nn.SiLU, gate_layer="hard_sigmoid")
        assert type(layer) is EcaModule
        assert [type(m) for m in layer.modules()] == [type(m) for m in theirs.modules()]
        layer.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 64, 4, 4)
        assert torch.equal(copy.deepcopy(layer)(x), theirs(x))

    @pytest.mark.parametrize("asked", [{}, {"attn_layer": "cbam"}, {"attn_layer": "cbam", "attn_kwargs": {}}], ids=str)
    def test_models_of_others_name_their_own(self, asked):
        class Net(torch.nn.Module):
            def __init__(self, num_classes=10, in_chans=3, attn_layer=None, attn_kwargs=None):
                super().__init__()
                self.asked = {"attn_layer": attn_layer, "attn_kwargs": attn_kwargs}
                self.block = timm.models.resnet.BasicBlock(16, 16)

        cfg = {"num_classes": 10, "classifier": "", "first_conv": "", "input_size": (3, 32, 32)}
        net = timm.models.build_model_with_cfg(Net, "net", False, pretrained_cfg=cfg, **asked)
        assert net.asked == {"attn_layer": None, "attn_kwargs": None, **asked}
        assert not hasattr(net, "attn_spec")
        placed = {"attn_layer": "cbam", "attn_where": "end"}  # which its constructor does not know
        net = timm.models.build_model_with_cfg(Net, "net", False, pretrained_cfg=cfg, **placed)
        assert [site.path for site in net.attn_sites] == ["block.se"]

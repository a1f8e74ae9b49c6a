import copy
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

import timm_eca
from conftest import randomize_
from fused_models import (
    MODELS,
    blocks_of,
    check_step,
    create,
    pixels,
    plain_twin,
    small,
    step,
)
from timm_eca.block_rule import rule_key
from timm_eca.fused import fuse_, unfuse_
from timm_eca.fused.blocks import RULES
from timm_eca.fused.halves import halves_of


class TestDoors:
    def test_default_and_off(self):
        assert blocks_of(timm.create_model("resnet18", attn_layer="eca"))
        assert not blocks_of(timm.create_model("resnet18", attn_layer="eca", fused=False))
        assert blocks_of(timm_eca.add_attn_(timm.create_model("resnet18"), "eca"))
        assert not blocks_of(timm_eca.add_attn_(timm.create_model("resnet18"), "eca", fused=False))

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_unfuse_restores_classes(self, name):
        plain, fused = (timm.create_model(name, attn_layer="eca", fused=fused) for fused in (False, True))
        kinds = [type(m) for m in plain.modules()]
        assert [type(m) for m in fused.modules()] != kinds
        assert unfuse_(fused) is fused
        assert [type(m) for m in fused.modules()] == kinds
        assert fuse_(fused) is fused
        assert len(blocks_of(fused)) == len(blocks_of(timm.create_model(name, attn_layer="eca")))

    def test_fuse_twice(self):
        model = timm.create_model("resnet18", attn_layer="eca")
        kinds = [type(m) for m in model.modules()]
        assert [type(m) for m in fuse_(model).modules()] == kinds

    @pytest.mark.parametrize("name", ["resnet18", "seresnet18", "convnext_atto"])
    def test_nothing_to_fuse(self, name):
        with pytest.raises(ValueError, match=r"no block that can be fused.*BasicBlock, Bottleneck.*InvertedResidual"):
            fuse_(timm.create_model(name, num_classes=0))

    def test_reads_as_before(self):
        model = small()
        plain = plain_twin(model)
        assert repr(model) == repr(plain)
        assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
        assert isinstance(model.layer1[0], timm.models.resnet.Bottleneck)

    @pytest.mark.parametrize("key", RULES)
    def test_rule_fits_timm(self, key):
        names = {"BasicBlock": "resnet18", "Bottleneck": "resnet26", "EdgeResidual": "efficientnet_es"}
        name = names.get(key.partition(":")[2], "mobilenetv2_050")
        with torch.device("meta"):
            model = timm.create_model(name, attn_layer="eca", fused=False)
        kinds = {type(m) for m in model.modules() if rule_key(getattr(type(m), "_made_from", (type(m),))[0]) == key}
        assert kinds, f"{name} has no {key} any more"
        for kind in kinds:
            assert halves_of(kind, RULES[key]) is not None, f"the forward of timm's {key} is no longer as its rule says"

    def test_state_dict(self):
        model = small()
        plain = plain_twin(model)
        assert list(model.state_dict()) == list(plain.state_dict())
        other = plain_twin(randomize_(model, seed=1))
        assert model.load_state_dict(plain.state_dict()).missing_keys == []
        assert torch.equal(model.layer1[0].bn3.weight, plain.layer1[0].bn3.weight)
        plain.load_state_dict(other.state_dict())
        assert torch.equal(plain.layer1[0].bn3.weight, other.layer1[0].bn3.weight)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: ModelEmaV3(m).module]
    )
    def test_copies(self, fused_calls, copied, ran, name):
        model = create(name, **MODELS[name]).double().eval()
        if ran:
            step(model, pixels(1))
        other = copied(model)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        count = len(fused_calls)
        assert torch.equal(other.eval()(pixels(1)), model(pixels(1)))
        assert len(fused_calls) == count + 2 * len(blocks_of(model))

    def test_copy_is_its_own(self):
        model = small().eval()
        before = model(pixels(1, dtype=torch.float32))
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert torch.equal(model(pixels(1, dtype=torch.float32)), before)
        assert not torch.equal(other(pixels(1, dtype=torch.float32)), before)

    def test_ema_follows(self, fused_calls):
        model = small().train()
        ema = ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, pixels(dtype=torch.float32))
        optimizer.step()
        ema.update(model)
        torch.testing.assert_close(
            ema.module.state_dict()["layer1.0.bn3.running_mean"] * 2 - model.layer1[0].bn3.running_mean,
            small().layer1[0].bn3.running_mean,
        )
        assert len(fused_calls) == len(blocks_of(model))


class TestIdentityStart:
    def test_bit_equal_then_fused(self, fused_calls):
        backbone = create("resnet18", num_classes=7).eval()
        model = timm.create_model("resnet18", attn_layer="eca", attn_init="identity", num_classes=7).eval()
        model.load_state_dict(backbone.state_dict())
        x = pixels(2, dtype=torch.float32)
        assert torch.equal(model(x), backbone(x))
        assert not fused_calls
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        check_step(model.train(), x, tolerance=1e-4)
        assert not fused_calls
        optimizer.step()
        check_step(model, x, tolerance=1e-4)
        assert len(fused_calls) == len(blocks_of(model))
        assert all(block._zero_kernel is False for block in blocks_of(model))

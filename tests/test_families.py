"""Every convolutional family of timm: placement seen from the running model, and the model as a model."""

import copy
import io
import json
import sys
import types

import pytest
import timm
import timm.layers
import timm.utils
import torch
from timm.models import _registry, group_parameters, reparameterize_model
from torch import nn

from additions import Recorder
from family_names import NAMES, SMALL, copy_of, create, enliven_, image, keeping, new, with_attn
from timm_eca import EcaLayer, add_attn_, attn_modules, plan_attn, timm_hooks
from timm_eca.block_rule import rule_key
from timm_eca.blocks import BLOCKS
from timm_eca.coverage import coverage_of, timm_names
from timm_eca.families import FAMILIES, TRANSFORMERS

# Classes with residual convolutions that no layer follows, and why.
OTHER_CONVOLUTIONS = {
    "PosConv": "csatv2's position encoding of a map of one channel, which has no others to be weighed against",
    "Residual": "iformer's position encoding RepCPE, which timm fuses into one convolution from outside the block",
    "FirstCellWithAttn": "a cell, whose output passes through the layer",
    "NormalCellWithAttn": "a cell, whose output passes through the layer",
}


def modules_of_timm():
    return {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm_names()}


class TestTable:
    def test_every_module_is_known(self):
        """A release of timm that brings a module fails here by its name."""
        assert modules_of_timm() - (FAMILIES | TRANSFORMERS) == set()
        assert (FAMILIES | TRANSFORMERS) - modules_of_timm() == set()
        assert not FAMILIES & TRANSFORMERS

    def test_a_new_module_is_seen(self):
        class Newnet(nn.Sequential):
            def __init__(self, num_classes=1000, in_chans=3, **kwargs):
                super().__init__(nn.Conv2d(in_chans, num_classes, 3))

        def newnet_small(pretrained=False, **kwargs):
            return timm.models.build_model_with_cfg(Newnet, "newnet_small", pretrained, **kwargs)

        newnet_small.__module__ = "timm.models.newnet"
        sys.modules["timm.models.newnet"] = types.ModuleType("timm.models.newnet")
        try:
            timm.models.register_model(newnet_small)
            assert modules_of_timm() - (FAMILIES | TRANSFORMERS) == {"newnet"}
            with pytest.raises(ValueError, match="newnet_small has no place for channel attention: Newnet"):
                timm.create_model("newnet_small", attn_layer="eca")
        finally:
            timm_hooks._unregister("newnet_small")
            _registry._module_to_models.pop("newnet", None)
            del sys.modules["timm.models.newnet"]
        assert not modules_of_timm() - (FAMILIES | TRANSFORMERS)

    def test_every_module_has_a_name_here(self):
        here = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in NAMES}
        assert here - {"levit"} == FAMILIES  # only some variants of which are convolutional

    def test_every_row_is_in_use(self):
        """Each row of the table is the row of some block of the models here, and each of their kinds of block."""
        used = set()
        for name in [
            *NAMES,
            "legacy_senet154",
            "legacy_seresnet50",
            "vit_base_r26_s32_224",
            "test_byobnet",
            "resnet61q",
        ]:
            model = timm.create_model(name, device="meta")
            used |= {rule_key(type(m)) for m in model.modules()} & BLOCKS.keys()
        assert used == BLOCKS.keys()

    def test_committed_coverage(self, repository):
        """The documentation's table fits this timm's names, and what is placed today."""
        rows = {r["name"]: r for r in json.loads((repository / "docs" / "coverage.json").read_text())["models"]}
        assert list(rows) == timm_names(), "timm-eca coverage --out docs writes the tables anew"
        for name in NAMES:
            today = coverage_of(name)
            assert rows[name]["sites"] == today.sites, name
            assert set(rows[name]["places"]) == set(today.places), name
        refused = {r["module"] for r in rows.values() if not r["sites"]}
        assert not refused & FAMILIES
        for module in refused:
            name = next(r["name"] for r in rows.values() if r["module"] == module and not r["sites"])
            assert coverage_of(name).refusal == rows[name]["refusal"]


@pytest.mark.parametrize("name", NAMES)
def test_every_residual_branch_ends_in_the_layer(name):
    model = new(name, attn_layer="eca", attn_where="end").eval()
    recorder = Recorder(EcaLayer)
    recorder.watch(model)
    widths = {}
    for path, layer in attn_modules(model).items():
        layer.register_forward_pre_hook(lambda m, inputs, path=path: widths.update({path: inputs[0].shape[1]}))
    with torch.no_grad(), recorder:
        model(image(name, batch=1))
    assert widths == {site.path: site.channels for site in model.attn_sites}
    for addition in recorder.additions:
        if not addition.gated and addition.convolutional:
            assert addition.modules[-1] in OTHER_CONVOLUTIONS


def test_other_convolutions_are_there():
    """The exceptions are those of the models that they are said of."""
    found = set()
    for name in ("csatv2", "iformer_t", "nasnetalarge"):
        model = new(name, attn_layer="eca", attn_where="end").eval()
        recorder = Recorder(EcaLayer)
        recorder.watch(model)
        with torch.no_grad(), recorder:
            model(image(name, batch=1))
        found |= {a.modules[-1] for a in recorder.additions if not a.gated and a.convolutional}
    assert found == OTHER_CONVOLUTIONS.keys()


@pytest.fixture(scope="class")
def plain(name):
    """A model without attention, of which tests make copies."""
    return create(name)


@pytest.mark.parametrize("name", SMALL, scope="class")  # all tests of a name in turn, with the same plain model
class TestAsAModel:
    def test_identity_start(self, name, plain):
        sites = {where: tuple(plan_attn(plain, attn_where=where)) for where in {keeping(plain), "add"}}
        x = image(name)
        for where in {sites[where]: where for where in sites}.values():  # each once where they are the same
            model = add_attn_(copy_of(plain), "eca", attn_where=where, attn_init="identity")
            with torch.no_grad():
                assert torch.equal(model.eval()(x), plain(x))

    def test_gradient_in_every_attention_weight(self, name, plain):
        model = enliven_(with_attn(plain))
        output = model(image(name))
        (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
        assert all((layer.conv.weight.grad != 0).any() for layer in attn_modules(model).values())

    def test_copies_and_checkpoints(self, name, plain):
        """Copies compute the same; plain weights load, complete ones too, half of the attention's do not."""
        where = keeping(plain)
        model = add_attn_(copy_of(plain), "eca", attn_where=where)
        x = image(name, batch=1)
        pickled = io.BytesIO()
        torch.save(model, pickled)
        pickled.seek(0)
        other = add_attn_(copy_of(plain), "eca", attn_where=where)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = model(x)
            for twin in (copy.deepcopy(model), torch.load(pickled, weights_only=False), other):
                assert torch.equal(twin(x), expected)
        replacing = add_attn_(copy_of(plain), "eca", attn_where="end")
        before = {path: layer.conv.weight.clone() for path, layer in attn_modules(replacing).items()}
        replacing.load_state_dict(plain.state_dict())
        assert all(torch.equal(layer.conv.weight, before[p]) for p, layer in attn_modules(replacing).items())
        lost = f"{model.attn_sites[-1].path}.conv.weight"
        half = {key: value for key, value in model.state_dict().items() if key != lost}
        with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
            other.load_state_dict(half, strict=False)

    def test_norms_convert(self, name, plain):
        """The layers keep running when norms are converted, by torch and by timm, or frozen, or branches fused."""
        model = with_attn(plain)
        x = image(name, batch=1)
        with torch.no_grad():
            expected = model(x)
        for convert in (
            nn.SyncBatchNorm.convert_sync_batchnorm,
            timm.layers.convert_sync_batchnorm,
            timm.utils.model.freeze_batch_norm_2d,
            reparameterize_model,
        ):
            converted = convert(copy_of(model))
            ran = set()
            for path, layer in attn_modules(converted).items():
                layer.register_forward_hook(lambda *_, ran=ran, path=path: ran.add(path))
            with torch.no_grad():
                output = converted(x)
            assert ran == attn_modules(model).keys()
            if convert != nn.SyncBatchNorm.convert_sync_batchnorm:  # torch's drops activations of timm's norms
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    def test_heads_and_layout(self, name, plain):
        x = image(name)
        model = with_attn(plain)
        if hasattr(model, "group_matcher"):
            groups = group_parameters(model, model.group_matcher())
            assert sum(map(len, groups.values())) == len(list(model.parameters()))
        with torch.no_grad():
            if hasattr(model, "reset_classifier"):
                model.reset_classifier(5)
                assert model(x).shape[-1] == 5
            expected = model(x)
            channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(channels_last, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_weights_in_foreign_files(tmp_path):
    """A model that reads npz files by itself keeps its identity start."""
    import numpy as np

    class Reader(timm.models.resnetv2.ResNetV2):
        @torch.no_grad()
        def load_pretrained(self, path):
            for key, value in np.load(path).items():
                self.get_parameter(key).copy_(torch.from_numpy(value))

    plain = create("resnetv2_18")
    np.savez(tmp_path / "weights.npz", **{k: v.detach().numpy() for k, v in plain.named_parameters()})
    overlay = {"file": str(tmp_path / "weights.npz"), "custom_load": True}
    original = timm.models.resnetv2.ResNetV2
    timm.models.resnetv2.ResNetV2 = Reader
    try:
        identity = {"attn_layer": "eca", "attn_init": "identity"}
        model = timm.create_model("resnetv2_18", pretrained=True, pretrained_cfg_overlay=overlay, **identity)
    finally:
        timm.models.resnetv2.ResNetV2 = original
    for key, buffer in plain.named_buffers():
        model.get_buffer(key).copy_(buffer)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain(x))

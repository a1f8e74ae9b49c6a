"""attn_where='stage': one layer at the end of each stage, and in the stage's feature."""

import pytest
import timm
import torch
from torch import nn

from family_names import NAMES, WithoutValues, image, new
from timm_eca import EcaLayer, attn_modules, plan_attn

# Features that are taken before the end of their stage, or after further layers: not the tensor that the layer gives.
# Also those of plain convolutions before the first block, which are a stem's whatever they are called.
OTHER_FEATURES = {
    "inception_resnet_v2": {0, 1},
    "inception_v3": {0, 1},
    "inception_v4": {0, 1},
    "vitamin_small_224": {0, 1, 2},  # of the transformer behind the convolutional stages
}


class Factor(nn.Module):
    """Multiplies its input by a number, and checks its width."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.register_buffer("factor", torch.ones(()), persistent=False)

    def forward(self, x):
        assert x.ndim == 4
        assert x.shape[1] == self.channels
        return x * self.factor


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_and_its_feature(name):
    """Each layer runs once, in order, on a tensor of its width; a layer that gives zero makes its feature zero."""
    x, ran = image(name, batch=1), []
    torch.manual_seed(0)
    plain = new(name, features_only=True).eval()
    whole = new(name, attn_layer=Factor, attn_where="stage", device="meta").eval()
    with WithoutValues():
        features = new(name, features_only=True, attn_layer=Factor, attn_where="stage").eval()
    features.load_state_dict(plain.state_dict(), strict=False)  # the layers are not in it
    for path, layer in attn_modules(whole).items():
        layer.register_forward_hook(lambda *_, path=path: ran.append(path))
    with torch.no_grad():
        whole(x.to("meta"))
        expected = plain(x)
        assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))
        for layer in attn_modules(features).values():
            layer.factor.zero_()
        gated = {index for index, feature in enumerate(features(x)) if not feature.any()}
    assert ran == [site.path for site in whole.attn_sites]
    assert [site.stage for site in whole.attn_sites] == list(range(1, len(ran) + 1))
    stem = {0} if plain.feature_info.reduction()[0] <= 2 else set()
    assert set(range(len(expected))) - gated <= stem | OTHER_FEATURES.get(name, set())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}),
        ("efficientnet_b0", {"blocks.0": 16, "blocks.1": 24, "blocks.2": 40, "blocks.4": 112, "blocks.6": 320}),
        ("densenet121", {f"features.denseblock{i}.denselayer1": c for i, c in enumerate((256, 512, 1024, 1024), 1)}),
        ("hrnet_w18_small", {f"incre_modules.{i}": c for i, c in enumerate((128, 256, 512, 1024))}),
        (
            "selecsls42",
            {"features.1": 128, "features.3": 288, "features.5": 480, "head.1": 1024, "head.3": 1280},
        ),
        ("efficientvim_m1", {"stages.0.blocks.1": 128, "stages.1.blocks.1": 192, "stages.2.blocks.1": 320}),
        ("xception41", {"blocks.0": 128, "blocks.1": 256, "blocks.10": 728, "blocks.12": 2048}),
        ("vgg11", {"features.2": 64, "features.5": 128, "features.10": 256, "features.15": 512, "features.20": 512}),
    ],
)
def test_where_the_layer_is(name, expected):
    model = timm.create_model(name, attn_layer="eca", attn_where="stage", device="meta")
    assert {s.path.removesuffix(".attn_stage"): s.channels for s in model.attn_sites} == expected
    assert all(isinstance(model.get_submodule(site.path), EcaLayer) for site in model.attn_sites)


def test_one_choice_per_stage():
    kwargs = {"attn_layer": "eca", "attn_where": "stage", "device": "meta"}
    model = timm.create_model("efficientnet_b0", attn_kwargs=[{"kernel_size": k} for k in (1, 3, 5, 7, 9)], **kwargs)
    assert [m.conv.kernel_size[0] for m in attn_modules(model).values()] == [1, 3, 5, 7, 9]
    model = timm.create_model("efficientnet_b0", attn_stages=(4, 5), **kwargs)
    assert list(attn_modules(model)) == ["blocks.4.attn_stage", "blocks.6.attn_stage"]


def test_a_stage_without_a_single_tensor():
    with pytest.raises(ValueError, match=r"attn_where='stage' does not fit .* stage1 gives no single tensor"):
        timm.create_model(
            "hrnet_w18_small", features_only=True, feature_location="", attn_layer="eca", attn_where="stage"
        )


@pytest.mark.parametrize("name", ["convnext_atto", "rexnet_100", "ghostnet_050"])
def test_a_network_for_features_has_the_numbers_of_its_model(name):
    model = timm.create_model(name, device="meta")
    features = timm.create_model(name, features_only=True, device="meta")
    numbers = {site.path.replace(".", "_"): site.stage for site in plan_attn(model, attn_where="add")}
    for site in plan_attn(features, attn_where="add"):
        assert site.stage == numbers[site.path.replace(".", "_")]


def test_all_stages_of_a_network_for_features():
    sites = plan_attn(timm.create_model("convnext_atto", features_only=True, device="meta"), attn_where="stage")
    assert {site.path.split(".")[0]: site.stage for site in sites} == {f"stages_{i}": i + 1 for i in range(4)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lcnetv2_base", {"stem": {1}, "stages": {1, 2, 3, 4}}),
        ("lowformer_e2", {"stem": {1}, "stages": {1, 2, 3, 4}}),
        ("mobilenetv5_300m", {"blocks": {1, 2, 3, 4}, "msfa": {4}}),
        ("nasnetalarge", {f"cell_{i}": {i + 1} for i in range(18)} | {"cell_stem_1": {1}, "reduction_cell_0": {7}}),
        ("pnasnet5large", {f"cell_{i}": {i + 1} for i in range(12)} | {"cell_stem_0": {1}}),
        ("dpn48b", {"features": {2, 3, 4, 5}}),
    ],
)
def test_numbers_from_names(name, expected):
    numbers = {}
    for site in plan_attn(timm.create_model(name, device="meta"), attn_where="end"):
        numbers.setdefault(site.path.split(".")[0], set()).add(site.stage)
    assert {part: numbers[part] for part in expected} == expected

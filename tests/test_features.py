"""features_only: the features of a model that starts as identity are the plain model's, bit for bit."""

import copy

import pytest
import timm
import torch

from family_names import NAMES, WithoutValues, create, image, keeping, new, small
from timm_eca import attn_modules

KINDS = ["list", "hook", "getter"]
IDENTITY = {"attn_layer": "eca", "attn_init": "identity"}


def features_of(name, weights, **kwargs):
    overlay = {"state_dict": dict(weights), "file": None}
    with WithoutValues():
        return new(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def check(name, **kind):
    whole = create(name)
    x = image(name, batch=1)
    with torch.no_grad():
        try:
            expected = features_of(name, whole.state_dict(), **kind)(x)
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            pytest.skip(f"timm extracts no such features from it: {error}")
        model = features_of(name, whole.state_dict(), **kind, **IDENTITY, attn_where=keeping(whole))
        features = model(x)
    assert len(attn_modules(model)) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected, strict=True))


@small
def test_as_timm_extracts_them(name):
    check(name)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@small
def test_every_kind(name, kind):
    check(name, feature_cls=kind)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["list", "getter"])  # a hook keeps the rest of the model
@pytest.mark.parametrize("where", ["add", "stage"])
@small
def test_every_layer_runs(name, kind, where):
    """Also where timm takes features inside of blocks, by other methods than forward."""
    try:
        plain = new(name, features_only=True, feature_cls=kind).eval()
        plain(image(name, batch=1))
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        pytest.skip(f"timm extracts no such features from it: {error}")
    model = new(name, features_only=True, feature_cls=kind, attn_layer="eca", attn_where=where).eval()
    assert attn_modules(model).keys() == ran_of(model, image(name, batch=1))


def ran_of(model, x):
    ran = set()
    for path, layer in attn_modules(model).items():
        layer.register_forward_hook(lambda *_, path=path: ran.add(path))
    with torch.no_grad():
        model(x)
    return ran


@pytest.mark.parametrize("where", ["auto", "stage"])
@pytest.mark.parametrize(
    "name", ["resnet18", "convmixer_768_32", "efficientnet_b0", "hrnet_w18_small", "xception41", "xception41p"]
)
def test_first_features_only(name, where):
    """timm cuts off what comes after the last feature asked for, layers with it, and the rest loads its weights."""
    arguments = {"feature_cls": "getter", "out_indices": (0, 1), "attn_layer": "eca", "attn_where": where}
    model = timm.create_model(name, features_only=True, **arguments).eval()
    x = image(name, batch=1) if name in NAMES else torch.randn(1, 3, 64, 64)
    assert ran_of(model, x) == attn_modules(model).keys()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), twin(x), strict=True))
    if len(attn_modules(model)) > 1:
        lost = f"{model.attn_sites[0].path}.conv.weight"
        incomplete = {key: value for key, value in model.state_dict().items() if key != lost}
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            twin.load_state_dict(incomplete, strict=False)

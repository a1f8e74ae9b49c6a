"""What a card says of a model that nobody released."""

import pytest
import timm
import yaml
from timm.models import get_pretrained_cfg

from timm_eca import hub
from timm_eca.cards import HUB_LICENSES, model_card


@pytest.fixture(scope="module")
def config():
    return hub.describe(timm.create_model("test_resnet"))


def licensed(config, value):
    config = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "license": value}}
    front = yaml.safe_load(model_card("net", config, 1).split("---")[1])
    return front["license"], front.get("license_name")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("apache-2.0", ("apache-2.0", None)),
        ("MIT", ("mit", None)),
        ("fastvit-license", ("other", "fastvit-license")),
        ("My own, version 1", ("other", "my-own-version-1")),
        (None, ("unknown", None)),
        ("other", ("other", None)),
    ],
)
def test_license(given, written, config):
    assert licensed(config, given) == written


def test_every_license_of_timm(config):
    """The values that the Hub's list lacks are those that look like a model's own."""
    values = {get_pretrained_cfg(name).license for name in timm.list_models(pretrained=True)} - {None}
    assert {"apache-2.0", "mobileone-license", "apple-ascl"} <= values
    for value in values:
        assert licensed(config, value) == ((value, None) if value in HUB_LICENSES else ("other", value))


def test_owner(config):
    card = model_card("net", config, 1)
    assert "hf-hub:ORG/net" in card
    assert "`ORG` stands for the owner of the repository." in card
    assert "ORG" not in model_card("eca_resnet18.ecanet_in1k", config, 1, released="eca_resnet18")


def test_names_that_are_no_text(config):
    card = model_card("n\udce9t", config, 1, origin="converted from `caf\udce9\n# Free for all`")
    assert "# Model card for n\\udce9t\n" in card
    assert "- **Origin:** converted from `caf\\udce9\\n# Free for all`\n" in card
    card.encode()

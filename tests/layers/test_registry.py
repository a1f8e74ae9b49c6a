import functools

import pytest
import timm.layers
import torch
from torch import nn

import timm_eca
from timm_eca.layers import registry


class Halve(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x / 2


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """A registration of one test must not reach the next."""
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


def test_decorator_and_call():
    assert timm_eca.register_attn("halve")(Halve) is Halve
    assert timm_eca.register_attn("Third", functools.partial(Halve)).func is Halve
    timm_eca.register_attn("made", lambda channels: Halve(channels))
    assert timm_eca.get_attn("HALVE") is Halve
    assert {"halve", "third", "made", "eca", "se", "cbam"} <= set(timm_eca.list_attns())
    assert timm_eca.list_attns() == sorted(timm_eca.list_attns())


def test_new_name_reaches_timm():
    timm_eca.register_attn("halve", Halve)
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(timm.layers.create_attn("Halve", 4)(x), x / 2)
    model = timm.create_model("resnet18", attn_layer="halve", device="meta")
    assert all(isinstance(m, Halve) for m in timm_eca.attn_modules(model).values())


def test_duplicate():
    with pytest.raises(ValueError, match=r"'ECA' is already registered as .*EcaLayer.*override=True"):
        timm_eca.register_attn("ECA", Halve)
    assert timm_eca.get_attn("eca") is timm_eca.EcaLayer
    timm_eca.register_attn("eca", Halve, override=True)
    assert timm_eca.get_attn("eca") is Halve


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"Unknown attention layer 'ecaa'\. Did you mean 'eca'.*Registered: a2, aa, bat, cbam"
    ):
        timm_eca.get_attn("ecaa")


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_refuses_name(name):
    with pytest.raises(ValueError, match="name must be a non-empty string, got"):
        timm_eca.register_attn(name, Halve)


@pytest.mark.parametrize("layer", [3, "se", nn.ReLU()])
def test_refuses_layer(layer):
    with pytest.raises(ValueError, match="must be a class, partial or function"):
        timm_eca.register_attn("mine", layer)


@pytest.mark.parametrize("layer", [3, True, None, nn.ReLU()])
def test_get_refuses(layer):
    with pytest.raises(ValueError, match="must be a name, class, partial or function, got"):
        timm_eca.get_attn(layer)


def test_entry_points_of_other_packages(run_python, tmp_path):
    (tmp_path / "their_package.py").write_text(
        "from torch import nn\n"
        "class Theirs(nn.Identity):\n"
        "    def __init__(self, channels):\n"
        "        super().__init__()\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[timm_eca.attn]\nTheirs = their_package:Theirs\neca = their_package:Theirs\nbroken = their_package:Missing\n"
    )
    output = run_python(
        "import timm, timm_eca, their_package as t\n"
        "assert timm_eca.get_attn('theirs') is t.Theirs\n"
        "assert timm_eca.get_attn('eca') is timm_eca.EcaLayer\n"  # a plugin cannot take a name
        "assert isinstance(timm.layers.create_attn('THEIRS', 8), t.Theirs)\n"
        "print(timm_eca.list_attns())\n"
        "try: timm_eca.get_attn('broken')\n"
        "except ValueError as e: print(e)\n",
        PYTHONPATH=str(tmp_path),
    )
    assert "'theirs'" in output
    assert "entry point broken = their_package:Missing" in output

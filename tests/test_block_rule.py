"""Which classes are timm's blocks: those whose forward is timm's, whatever they are called."""

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from timm_eca import EcaLayer, add_attn_, attn_modules
from timm_eca.block_rule import rule_key
from timm_eca.fused import fuse_


def namesake(base):
    """A class of another package with the name of one of timm's, and in a module of the same name."""
    return type(base.__name__, (nn.Module,), {"__module__": "torchvision.models.resnet", "forward": lambda self, x: x})


class SameForward(Bottleneck):
    """A block that adds something, and computes as timm's."""


class OwnForward(Bottleneck):
    def forward(self, x):
        return x + self.bn3(self.conv3(self.conv1(x)))


class OwnSequential(nn.Sequential):
    """As any code may have one."""


def test_a_namesake_is_no_block():
    assert rule_key(Bottleneck) == "resnet:Bottleneck"
    assert rule_key(namesake(Bottleneck)) == ""
    model = timm.create_model("resnet26", device="meta")
    for block in (m for m in model.modules() if isinstance(m, Bottleneck)):
        block.__class__ = namesake(Bottleneck)
    with pytest.raises(ValueError, match="has no place for channel attention"):
        add_attn_(model, "eca")


def test_a_subclass_with_timms_forward_is_the_block(images):
    model = ResNet(SameForward, (1, 1, 1, 1), num_classes=2).eval()
    plain = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=2).eval()
    plain.load_state_dict(model.state_dict())
    add_attn_(model, "eca", attn_init="identity")
    assert len(attn_modules(model)) == 4
    assert torch.equal(model(images), plain(images))
    assert isinstance(fuse_(model).layer1[0], SameForward)


def test_a_subclass_with_a_forward_of_its_own_is_not():
    assert rule_key(OwnForward) == ""
    assert rule_key(OwnSequential) == "container:Sequential"


def test_every_placed_layer_is_called(images):
    """Blocks of three kinds in one model: layers go into those that call them."""
    model = ResNet(Bottleneck, (3, 1, 1, 1), num_classes=2).eval()
    model.layer1[1].__class__, model.layer1[2].__class__ = SameForward, OwnForward
    add_attn_(model, "eca")
    called = []
    for path, layer in attn_modules(model).items():
        layer.register_forward_hook(lambda *_, path=path: called.append(path))
    model(images)
    assert called == ["layer1.0.se", "layer1.1.se", "layer2.0.se", "layer3.0.se", "layer4.0.se"]
    assert all(type(model.get_submodule(path)) is EcaLayer for path in called)

"""The counters against counts made by hand, and against torchvision's models."""

import pytest
import torch
from torch import nn

from timm_eca import add_attn_
from timm_eca.complexity.counting import COUNTERS, count
from timm_eca.complexity.systems import eca, plain


class Small(nn.Module):
    """3 x 8 x 8 -> conv 3x3 to 4 channels -> ReLU -> pool -> linear to 5."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def test_by_hand():
    cost = count(Small(), size=8)
    conv, linear = 4 * 8 * 8 * 3 * 9, 4 * 5
    assert cost.parameters == 4 * 3 * 9 + 4 * 5 + 5
    assert cost.operations["torch"] == conv + linear
    assert cost.operations["thop"] == conv + linear
    assert cost.operations["thop-2019"] == conv + 4 * 8 * 8 + (2 * 4 - 1) * 5


def test_same_model_elsewhere():
    """thop 0.0.23, of July 2019, counts 334,871,520 for torchvision's MobileNetV2: the paper's 319.4 x 2^20."""
    import torchvision

    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2()
    ours = plain("mobilenetv2_100")
    counts = count(ours), count(theirs)
    assert counts[0].parameters == counts[1].parameters == 3_504_872
    for counter in COUNTERS:
        assert counts[0].operations[counter] == pytest.approx(counts[1].operations[counter], rel=2e-4)
    assert counts[0].operations["thop-2019"] == pytest.approx(334_871_520, rel=2e-4)


def test_products_are_counted():
    """Matrix products of a layer count as its convolutions do, and the model stays as it is."""
    model = add_attn_(plain("mobilenetv2_100"), "a2", attn_stages=(7,))
    before = [type(m) for m in model.modules()]
    cost, bare = count(model), count(plain("mobilenetv2_100"))
    width, positions, channels = 80, 49, 320
    convolutions, products = 4 * channels * width * positions, 2 * width * width * positions
    for counter in ("thop", "torch"):
        assert cost.operations[counter] - bare.operations[counter] == convolutions + products
    assert [type(m) for m in model.modules()] == before


def test_eca_costs_its_convolutions():
    added = count(eca("resnet50")).operations["thop"] - count(plain("resnet50")).operations["thop"]
    assert added == 3 * 256 * 3 + 4 * 512 * 5 + 6 * 1024 * 5 + 3 * 2048 * 7

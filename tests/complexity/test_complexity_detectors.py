"""The detectors whose parameters are compared: detectors that run, as large as torchvision's own."""

import pytest
import timm
import torch
from torch import nn

from timm_eca.complexity.detectors import DETECTORS, build_detector, trainable


@pytest.mark.parametrize("name", DETECTORS)
def test_stem_and_first_stage_are_frozen(name):
    detector = build_detector(name, timm.create_model("resnet50", device="meta"))
    frozen = [n.split(".") for n, p in detector.named_parameters() if not p.requires_grad]
    assert {(part[1], part[2]) for part in frozen} == {("resnet", n) for n in ("conv1", "bn1", "layer1")}


@pytest.mark.filterwarnings("ignore:Changing trainable_backbone_layers")
def test_as_large_as_torchvisions():
    from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

    for name, build in (("Faster R-CNN", fasterrcnn_resnet50_fpn), ("Mask R-CNN", maskrcnn_resnet50_fpn)):
        with torch.device("meta"):
            theirs = build(weights=None, weights_backbone=None, num_classes=81)
        ours = build_detector(name, timm.create_model("resnet50", device="meta"))
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        body = theirs.backbone.body
        frozen = sum(p.numel() for m in (body.conv1, body.bn1, body.layer1) for p in m.parameters())
        assert trainable(ours) == sum(p.numel() for p in theirs.parameters()) - frozen


def test_it_detects():
    detector = build_detector("RetinaNet", timm.create_model("resnet50", device="meta")).to_empty(device="cpu").eval()
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.01)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    with torch.no_grad():
        (found,) = detector([torch.rand(3, 64, 64)])
    assert set(found) == {"boxes", "scores", "labels"}

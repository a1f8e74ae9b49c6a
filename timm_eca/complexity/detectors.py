"""The detectors of Tables 5 and 6, built from torchvision's parts around timm's backbones."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

__all__ = ["DETECTORS", "build_detector", "trainable"]

DETECTORS = ("Faster R-CNN", "Mask R-CNN", "RetinaNet")
COCO_CLASSES = 80


class PyramidBackbone(nn.Module):
    """A ResNet of timm with a feature pyramid, as torchvision's detectors want it."""

    def __init__(self, resnet: nn.Module, levels: tuple[int, ...], extra_blocks: nn.Module):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.resnet: Any = resnet
        self.levels = levels
        self.out_channels = 256
        widths = [getattr(resnet, f"layer{level}")[-1].conv3.out_channels for level in levels]
        self.fpn = FeaturePyramidNetwork(widths, self.out_channels, extra_blocks)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.resnet.maxpool(self.resnet.act1(self.resnet.bn1(self.resnet.conv1(x))))
        features = OrderedDict()
        for level in range(1, 5):
            x = getattr(self.resnet, f"layer{level}")(x)
            if level in self.levels:
                features[str(level)] = x
        return self.fpn(features)


def build_detector(name: str, resnet: nn.Module) -> nn.Module:
    """Return a detector of `DETECTORS` around a ResNet, its stem and first stage frozen as in MMDetection.

    Faster and Mask R-CNN see the four stages, RetinaNet the last three and two levels made from the last one.
    """
    from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    _drop_head(resnet)
    with torch.device("meta"):
        if name == "RetinaNet":
            backbone = PyramidBackbone(resnet, (2, 3, 4), LastLevelP6P7(2048, 256))
            return RetinaNet(backbone, COCO_CLASSES, anchor_generator=_five_levels())
        backbone = PyramidBackbone(resnet, (1, 2, 3, 4), LastLevelMaxPool())
        cls = {"Faster R-CNN": FasterRCNN, "Mask R-CNN": MaskRCNN}[name]
        return cls(backbone, COCO_CLASSES + 1)


def trainable(detector: nn.Module) -> int:
    """Return the number of parameters outside the frozen stem and first stage."""
    return sum(p.numel() for p in detector.parameters() if p.requires_grad)


def _drop_head(resnet: nn.Module) -> None:
    resnet.reset_classifier(0)  # type: ignore[operator]
    for name in ("conv1", "bn1", "layer1"):
        resnet.get_submodule(name).requires_grad_(False)


def _five_levels() -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    sizes = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))

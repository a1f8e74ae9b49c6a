"""The official ECA networks stated once more, from the paper and the official repository's key names.

Written for the tests alone, on torch only: an independent answer to what a converted model must compute.
"""

import torch
from torch import nn


class Eca(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=(k - 1) // 2, bias=False)

    def forward(self, x):
        pooled = x.flatten(2).mean(2)  # (B, C)
        taps = self.conv.weight.flatten()
        reach = len(taps) // 2
        padded = nn.functional.pad(pooled, (reach, reach))
        mixed = sum(tap * padded[:, i : i + pooled.shape[1]] for i, tap in enumerate(taps))
        return x * torch.sigmoid(mixed)[..., None, None]


def conv(i, o, kernel, stride=1, groups=1):
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    expansion = 1

    def __init__(self, i, width, stride, k):
        super().__init__()
        self.conv1, self.bn1 = conv(i, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.eca = Eca(k)
        self.downsample = shortcut(i, width, stride)

    def branch(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    def forward(self, x):
        return (self.eca(self.branch(x)) + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(Basic):
    expansion = 4

    def __init__(self, i, width, stride, k):
        nn.Module.__init__(self)
        self.conv1, self.bn1 = conv(i, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, width * 4, 1), nn.BatchNorm2d(width * 4)
        self.eca = Eca(k)
        self.downsample = shortcut(i, width * 4, stride)

    def branch(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.bn3(self.conv3(self.bn2(self.conv2(x)).relu()))


def shortcut(i, o, stride):
    return None if (i, stride) == (o, 1) else nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))


class ResNet(nn.Module):
    def __init__(self, block, depths, kernels, classes=1000):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        for stage, (depth, k) in enumerate(zip(depths, kernels)):
            blocks = []
            for j in range(depth):
                blocks.append(block(channels, 64 * 2**stage, 2 if stage and not j else 1, k))
                channels = 64 * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class ConvBnRelu6(nn.Sequential):
    def __init__(self, i, o, kernel, stride=1, groups=1):
        super().__init__(conv(i, o, kernel, stride, groups), nn.BatchNorm2d(o), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, i, o, stride, expand):
        super().__init__()
        hidden = i * expand
        layers = [] if expand == 1 else [ConvBnRelu6(i, hidden, 1)]
        layers += [ConvBnRelu6(hidden, hidden, 3, stride, hidden), conv(hidden, o, 1), nn.BatchNorm2d(o)]
        self.conv = nn.Sequential(*layers, Eca(1 if o < 96 else 3))
        self.residual = stride == 1 and i == o

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        rows = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        features, channels = [ConvBnRelu6(3, 32, 3, 2)], 32
        for expand, o, repeats, stride in rows:
            for j in range(repeats):
                features.append(InvertedResidual(channels, o, 1 if j else stride, expand))
                channels = o
        self.features = nn.Sequential(*features, ConvBnRelu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.25), nn.Linear(1280, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


RESNETS = {
    "eca_resnet18": (Basic, (2, 2, 2, 2), (3, 5, 7, 7)),
    "eca_resnet34": (Basic, (3, 4, 6, 3), (3, 3, 5, 7)),
    "eca_resnet50": (Bottleneck, (3, 4, 6, 3), (3, 5, 5, 7)),
    "eca_resnet101": (Bottleneck, (3, 4, 23, 3), (3, 3, 5, 7)),
    "eca_resnet152": (Bottleneck, (3, 8, 36, 3), (3, 3, 5, 7)),
}


def official(name, **kwargs):
    return MobileNetV2(**kwargs) if name == "eca_mobilenetv2_100" else ResNet(*RESNETS[name], **kwargs)


def training_checkpoint(model, **extra):
    """What the official repository's script writes, every key behind `module.` as DataParallel has it."""
    weights = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    return {"epoch": 100, "arch": "se_resnet50", "state_dict": weights, "best_prec1": torch.tensor(77.0), **extra}

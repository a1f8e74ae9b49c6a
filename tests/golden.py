"""The weights of the six official models by hand: official key, timm's key and shape, in the file's order.

From the official repository's key tables and the papers of the backbones (ResNet, Table 1; MobileNetV2, Table 2).
"""

NORM = ("weight", "bias", "running_mean", "running_var")


def norm(theirs, ours, channels):
    yield from ((f"{theirs}.{key}", f"{ours}.{key}", (channels,)) for key in NORM)
    yield f"{theirs}.num_batches_tracked", f"{ours}.num_batches_tracked", ()


def resnet(depths, bottleneck, kernels):
    yield "conv1.weight", "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", "bn1", 64)
    channels = 64
    for i, (depth, k, width) in enumerate(zip(depths, kernels, (64, 128, 256, 512)), 1):
        out = 4 * width if bottleneck else width
        for j in range(depth):
            at = f"layer{i}.{j}"
            if bottleneck:
                shapes = [(width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            else:
                shapes = [(width, channels, 3, 3), (width, width, 3, 3)]
            for n, shape in enumerate(shapes, 1):
                yield f"{at}.conv{n}.weight", f"{at}.conv{n}.weight", shape
                yield from norm(f"{at}.bn{n}", f"{at}.bn{n}", shape[0])
            yield f"{at}.eca.conv.weight", f"{at}.se.conv.weight", (1, 1, k)
            if j == 0 and channels != out:
                yield f"{at}.downsample.0.weight", f"{at}.downsample.0.weight", (out, channels, 1, 1)
                yield from norm(f"{at}.downsample.1", f"{at}.downsample.1", out)
            channels = out
    yield "fc.weight", "fc.weight", (1000, channels)
    yield "fc.bias", "fc.bias", (1000,)


# Official number of the inverted residual, timm's stage and block, input and output channels, ECA kernel size.
INVERTED = [
    (2, "1.0", 16, 24, 1),
    (3, "1.1", 24, 24, 1),
    (4, "2.0", 24, 32, 1),
    (5, "2.1", 32, 32, 1),
    (6, "2.2", 32, 32, 1),
    (7, "3.0", 32, 64, 1),
    (8, "3.1", 64, 64, 1),
    (9, "3.2", 64, 64, 1),
    (10, "3.3", 64, 64, 1),
    (11, "4.0", 64, 96, 3),
    (12, "4.1", 96, 96, 3),
    (13, "4.2", 96, 96, 3),
    (14, "5.0", 96, 160, 3),
    (15, "5.1", 160, 160, 3),
    (16, "5.2", 160, 160, 3),
    (17, "6.0", 160, 320, 3),
]


def mobilenetv2():
    yield "features.0.0.weight", "conv_stem.weight", (32, 3, 3, 3)
    yield from norm("features.0.1", "bn1", 32)
    yield "features.1.conv.0.0.weight", "blocks.0.0.conv_dw.weight", (32, 1, 3, 3)
    yield from norm("features.1.conv.0.1", "blocks.0.0.bn1", 32)
    yield "features.1.conv.1.weight", "blocks.0.0.conv_pw.weight", (16, 32, 1, 1)
    yield from norm("features.1.conv.2", "blocks.0.0.bn2", 16)
    yield "features.1.conv.3.conv.weight", "blocks.0.0.attn_last.conv.weight", (1, 1, 1)
    for number, block, i, o, k in INVERTED:
        theirs, ours = f"features.{number}.conv", f"blocks.{block}"
        yield f"{theirs}.0.0.weight", f"{ours}.conv_pw.weight", (6 * i, i, 1, 1)
        yield from norm(f"{theirs}.0.1", f"{ours}.bn1", 6 * i)
        yield f"{theirs}.1.0.weight", f"{ours}.conv_dw.weight", (6 * i, 1, 3, 3)
        yield from norm(f"{theirs}.1.1", f"{ours}.bn2", 6 * i)
        yield f"{theirs}.2.weight", f"{ours}.conv_pwl.weight", (o, 6 * i, 1, 1)
        yield from norm(f"{theirs}.3", f"{ours}.bn3", o)
        yield f"{theirs}.4.conv.weight", f"{ours}.attn_last.conv.weight", (1, 1, k)
    yield "features.18.0.weight", "conv_head.weight", (1280, 320, 1, 1)
    yield from norm("features.18.1", "bn2", 1280)
    yield "classifier.1.weight", "classifier.weight", (1000, 1280)
    yield "classifier.1.bias", "classifier.bias", (1000,)


# Number of keys: (convolutions + 5 per norm + classifier 2 + ECA), counted from the papers' tables.
KEYS = {
    "eca_resnet18": 20 + 5 * 20 + 2 + 8,
    "eca_resnet34": 36 + 5 * 36 + 2 + 16,
    "eca_resnet50": 53 + 5 * 53 + 2 + 16,
    "eca_resnet101": 104 + 5 * 104 + 2 + 33,
    "eca_resnet152": 155 + 5 * 155 + 2 + 50,
    "eca_mobilenetv2_100": 331,
}

GOLDEN = {
    "eca_resnet18": list(resnet((2, 2, 2, 2), False, (3, 5, 7, 7))),
    "eca_resnet34": list(resnet((3, 4, 6, 3), False, (3, 3, 5, 7))),
    "eca_resnet50": list(resnet((3, 4, 6, 3), True, (3, 5, 5, 7))),
    "eca_resnet101": list(resnet((3, 4, 23, 3), True, (3, 3, 5, 7))),
    "eca_resnet152": list(resnet((3, 8, 36, 3), True, (3, 3, 5, 7))),
    "eca_mobilenetv2_100": list(mobilenetv2()),
}

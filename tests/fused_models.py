"""Models with fused blocks, and all that a step gives of them, for the tests of fused tails."""

import copy

import pytest
import timm
import torch
from torch import nn

from conftest import randomize_
from timm_eca.fused import unfuse_
from timm_eca.fused.blocks import FusedBlock

ECA = {"attn_layer": "eca", "num_classes": 7}
END = {**ECA, "attn_where": "end"}
SMALL = {"layers": (1, 2, 1, 1), "channels": (8, 12, 16, 70), **ECA}
MODELS = {
    "resnet18": {"layers": (2, 2, 1, 1), **ECA},
    "resnet26": {"drop_path_rate": 0.4, **ECA},
    "resnet50": {"layers": (2, 1, 2, 2), "channels": (16, 24, 32, 40), **ECA},
    "resnet26d": {"layers": (1, 2, 1, 1), **ECA},
    "seresnet50": {"layers": (1, 2, 1, 1), **END},
    "resnext50_32x4d": {"layers": (1, 2, 1, 1), **ECA},
    "mobilenetv2_050": {"drop_path_rate": 0.2, **ECA},
    "efficientnet_b0": END,
    "efficientnet_es": ECA,
    "ecaresnet26t": {"num_classes": 7},
    "ecaresnet50d": {"layers": (1, 2, 1, 2), "num_classes": 7},
}
compiler_calls_blocks = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15),
    reason="the compiler of PyTorch 2.8 calls a block's forward: the plain path",
)


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(timm.create_model(name, **kwargs))


def small(**kwargs) -> nn.Module:
    """Bottlenecks, of which one has no downsample."""
    return create("resnet26", **{**SMALL, **kwargs})


def short(**kwargs) -> nn.Module:
    """The first blocks of a MobileNetV2, with and without a shortcut: for compilers, which take long over all."""
    model = create("mobilenetv2_050", **{**ECA, **kwargs})
    return nn.Sequential(model.conv_stem, model.bn1, model.blocks[:3])


def plain_twin(model: nn.Module) -> nn.Module:
    return unfuse_(copy.deepcopy(model))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def pixels(batch: int = 2, size: int = 64, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """All that one step gives: outputs, gradients, buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(cotangent)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": {"": out.detach()}, "grads": {"input": x.grad, **grads}, "buffers": dict(model.named_buffers())}


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-12) -> None:
    """Compare relative to a tensor's largest magnitude; gradients that should be zero against the largest of all."""
    largest = max(grad.abs().max().item() for grad in expected["grads"].values())
    for kind, tensors in expected.items():
        assert actual[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            scale = max(tensor.abs().max().item(), largest if kind == "grads" else 0)
            off = (actual[kind][name].double() - tensor.double()).abs().max().item()
            assert off <= tolerance * scale, f"{kind} {name}: off by {off:.3g} where the largest is {scale:.3g}"


def check_step(model: nn.Module, x: torch.Tensor | None = None, tolerance: float = 1e-12) -> None:
    x = pixels() if x is None else x
    plain = plain_twin(model)
    assert_same(step(model, x), step(plain, x), tolerance)

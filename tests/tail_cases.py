"""Tails made of modules and fused, and all that they give, for the tests of fused tails."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from timm_eca import EcaLayer
from timm_eca.fused.formula import Moments, Running, TailWeights
from timm_eca.fused.tail import fused_tail

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LEAVES = ("z", "shortcut", "weight", "bias", "kernel")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ON_CPU = pytest.mark.parametrize("engine", ["native", "passes"], indirect=True)  # not what is interpreted, for its time


class Case(NamedTuple):
    """What a tail is made of, in few words."""

    shape: tuple[int, int, int, int] = (3, 9, 5, 7)
    kernel_size: int = 3
    train: bool = True
    affine: bool = True
    add: bool = True
    relu: bool = True
    drop: bool = False
    tracked: bool = True
    layout: torch.memory_format = torch.contiguous_format
    mean: float = 0.3
    std: float = 1.5
    eps: float = 1e-5
    momentum: float = 0.1
    seed: int = 0


def make(case: Case, dtype: torch.dtype, vectors: torch.dtype | None = None) -> dict[str, torch.Tensor | None]:
    """The tensors of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    vectors = vectors or dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, channels = case.shape[:2]
    level = case.mean * (1 + normal(1, channels, 1, 1) / 4)
    maps = {
        "z": level + case.std * (normal(*case.shape) + normal(batch, channels, 1, 1)),
        "shortcut": normal(*case.shape),
        "cotangent": normal(*case.shape),
    }
    kernel = normal(1, 1, case.kernel_size)
    rest = {"weight": normal(channels), "bias": normal(channels), "kernel": kernel}
    kept = {"running_mean": level.flatten() + normal(channels) / 4, "running_var": case.std**2 + normal(channels) ** 2}
    drop = torch.rand(batch, 1, generator=generator) < 0.6
    made: dict[str, torch.Tensor | None] = {
        name: t.to(dtype).contiguous(memory_format=case.layout) for name, t in maps.items()
    }
    made |= {name: t.to(vectors) for name, t in (rest | kept).items()}
    made["drop"] = (drop / 0.5).to(dtype) if case.drop else None
    if not case.add:
        made["shortcut"] = None
    if not case.affine:
        made["weight"] = made["bias"] = None
    return made


def leaves(made: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        name: made[name].detach().to(dtype or made[name].dtype).clone().requires_grad_()
        for name in LEAVES
        if made[name] is not None
    }


def finish(out: torch.Tensor, cotangent: torch.Tensor, inputs: dict, kept: tuple) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(out, list(inputs.values()), cotangent)
    return {"out": out.detach(), **dict(zip(inputs, grads)), "running_mean": kept[0], "running_var": kept[1]}


def plain_out(case: Case, inputs: dict, made: dict, relu: bool) -> tuple[torch.Tensor, nn.BatchNorm2d]:
    """A tail out of modules, in the type of its inputs."""
    z, channels = inputs["z"], case.shape[1]
    norm = nn.BatchNorm2d(channels, case.eps, case.momentum, case.affine, case.tracked or not case.train).train(
        case.train
    )
    layer = EcaLayer(kernel_size=case.kernel_size)
    norm, layer = norm.to(z.dtype), layer.to(z.dtype)
    with torch.no_grad():
        for name in ("running_mean", "running_var") if norm.track_running_stats else ():
            getattr(norm, name).copy_(made[name])
    named = {"weight": inputs["weight"], "bias": inputs["bias"]} if case.affine else {}
    out = torch.func.functional_call(norm, named, (z,))
    out = torch.func.functional_call(layer, {"conv.weight": inputs["kernel"]}, (out,))
    if made["drop"] is not None:
        out = out * made["drop"].to(z.dtype)[..., None, None]
    if case.add:
        out = out + inputs["shortcut"]
    return (torch.relu(out) if relu else out), norm


def plain(case: Case, made: dict, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Everything a tail gives, by modules. The cotangent stays away from the ReLU's corner."""
    inputs = leaves(made, dtype)
    with torch.no_grad():
        ahead, _ = plain_out(case, leaves(made, torch.float64), made, relu=False)
        made["cotangent"] *= ahead.abs() > 0.05
    out, norm = plain_out(case, inputs, made, case.relu)
    nothing = torch.zeros(())
    kept = (norm.running_mean, norm.running_var) if norm.track_running_stats else (nothing, nothing)
    return finish(out, made["cotangent"].to(dtype), inputs, kept)


def weights_of(case: Case, inputs: dict, made: dict, gate: nn.Module | None = None) -> tuple[TailWeights, tuple]:
    kept = (made["running_mean"].clone(), made["running_var"].clone())
    weights = TailWeights(
        kernel=inputs["kernel"],
        gate=gate or torch.sigmoid,
        weight=inputs.get("weight"),
        bias=inputs.get("bias"),
        moments=None if case.train else Moments(*kept),
        running=Running(*kept, case.momentum) if case.train and case.tracked else None,
        drop=made["drop"],
        eps=case.eps,
    )
    nothing = torch.zeros(())
    return weights, (kept if case.tracked or not case.train else (nothing, nothing))


def tail_of(case: Case, made: dict, function=fused_tail) -> dict[str, torch.Tensor]:
    """Everything a tail gives, by the function under test."""
    inputs = leaves(made)
    weights, kept = weights_of(case, inputs, made)
    out = function(inputs["z"], inputs.get("shortcut"), weights, case.relu)
    return finish(out, made["cotangent"], inputs, kept)


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Compare relative to a tensor's largest magnitude, and to the largest gradient's where that is nearly zero."""
    assert actual.keys() == expected.keys()
    largest = max(expected[name].abs().max().item() for name in expected if name in LEAVES)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = max(value.abs().max().item(), 1e-2 * largest if name in LEAVES else 0.0)
        off = (actual[name].double() - value.double()).abs().max().item()
        assert off <= tolerance * scale, f"{name}: off by {off:.3g} where the largest is {scale:.3g}"


def check(case: Case, dtype: torch.dtype, vectors: torch.dtype | None = None, function=fused_tail) -> None:
    made = make(case, dtype, vectors)
    expected = plain(case, made)
    actual = tail_of(case, made, function)
    assert actual["out"].dtype == actual["z"].dtype == dtype
    assert actual["kernel"].dtype == (vectors or dtype)
    assert actual["out"].is_contiguous(memory_format=case.layout)
    assert_close(actual, expected, TOLERANCES[dtype])

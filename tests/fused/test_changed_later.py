"""Blocks that are changed after their first call compute as the plain path does from then on."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fused_models import blocks_of, create, pixels, plain_twin, small


def other_act(block):
    block.act3.__class__ = nn.SiLU


def biased_kernel(block):
    block.se.conv.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))


def subclass(block):
    cls = type(block)
    block.__class__ = type("Halved", (cls,), {"forward": lambda self, x: cls.forward(self, x) / 2})


@pytest.mark.parametrize("change", [other_act, biased_kernel, subclass])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_part(change, compiled):
    model = small().double().eval()
    x = pixels(size=32)
    plain = plain_twin(model)
    with torch.no_grad():
        model(x)
        change(blocks_of(model)[1])
        change([m for m in plain.modules() if hasattr(m, "se")][1])
        expected = plain(x)
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(x) if compiled else model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_skips():
    model = create("mobilenetv2_050", attn_layer="eca").double().eval()
    plain, x = plain_twin(model), pixels(size=32)
    with torch.no_grad():
        model(x)
        for m in (model, plain):
            m.blocks[2][1].has_skip = False
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-12)


def test_a_method_of_the_layer():
    model, seen = small().double().eval(), []
    layer = blocks_of(model)[1].se
    own = layer.channel_weights
    with torch.no_grad():
        model(pixels(size=32))
        layer.channel_weights = lambda x: seen.append(1) or own(x)
        model(pixels(size=32))
    assert seen == [1]


@pytest.mark.parametrize("name", ["act", "drop"])
def test_a_hook_inside_the_norm(name):
    model = create("mobilenetv2_050", attn_layer="eca").double().eval()
    plain, x = plain_twin(model), pixels(size=32)
    for m in (model, plain):
        m.blocks[2][1].bn3.get_submodule(name).register_forward_hook(lambda module, given, out: out * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-12)


def test_a_gate_that_draws():
    """A backward pass would evaluate it again, by another draw."""
    model = small().double().train()
    plain, x = plain_twin(model), pixels(size=32)
    found = []
    for m in (model, plain):
        for layer in (module.se for module in m.modules() if hasattr(module, "se")):
            layer.gate = nn.Sequential(nn.Sigmoid(), nn.Dropout(0.3))
        torch.manual_seed(0)
        m(x).square().sum().backward()
        found.append(m.conv1.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_downsample_that_draws():
    """In the order in which the plain path draws: the drop path first."""
    model = small(drop_path_rate=0.5).double().train()
    for block in blocks_of(model):
        if block.downsample is not None:
            block.downsample.insert(0, nn.Dropout(0.5))
    plain, x = plain_twin(model), pixels(size=32)
    found = []
    for m in (model, plain):
        torch.manual_seed(0)
        found.append(m(x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_unfused_is_as_if_it_had_never_been_fused():
    model = small().eval()
    with torch.no_grad():
        model(pixels(size=32, dtype=torch.float32))
    assert not [m for m in plain_twin(model).modules() if {"_parts", "_zero_kernel"} & m.__dict__.keys()]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_given_up_is_freed(training):
    """At once, with its weights and maps, not when Python next looks for what refers to itself."""
    model = small().train(training)
    weights = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        model(pixels(size=32, dtype=torch.float32)).sum().backward()
        del model
        assert not [ref for ref in weights if ref() is not None]
    finally:
        gc.enable()

"""Gradients that can be differentiated again, where a tensor has more than one way to the result."""

import pytest
import torch

from fused_models import blocks_of, create, plain_twin, small


def gradients(block, x, leaves):
    value = block(block(x)).square().sum()
    first = torch.autograd.grad(value, leaves(block), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves(block))
    return *first, *second


@pytest.mark.parametrize("training", [True, False])
def test_a_block_applied_twice(training):
    """What lies before a map is differentiated once, though it leads to the same weights."""
    block = blocks_of(small())[2].double().train(training)
    x = torch.randn(2, block.conv1.in_channels, 9, 9, dtype=torch.float64)

    def leaves(b):
        return b.bn1.weight, b.bn3.weight, b.bn3.bias, b.se.conv.weight, b.conv3.weight

    ours, plain = gradients(block, x, leaves), gradients(plain_twin(block), x, leaves)
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_layer_shared_by_blocks():
    model = small(layers=(1, 3, 1, 1)).double().train()
    first, second = model.layer2[1:]
    second.se = first.se
    plain = plain_twin(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = [
        torch.autograd.grad(m(x).square().sum(), m.layer2[1].se.conv.weight, create_graph=True)[0]
        for m in (model, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_hooks_of_tensors_run_once():
    model = create("resnet18", layers=(1, 1, 1, 1), attn_layer="eca").double().train()
    plain = plain_twin(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = []
    for m in (model, plain):
        block = m.layer1[0]
        leaves = (block.bn1.weight, block.bn2.weight, block.bn2.bias, block.se.conv.weight)
        for leaf in leaves:
            leaf.register_hook(lambda grad: grad * 0.5)
        m(x).square().sum().backward(create_graph=True)
        found.append([leaf.grad.detach().clone() for leaf in leaves])
        m.zero_grad()  # a graph that holds its own gradients is never freed
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

import pytest
import timm
import torch
from torch import nn

import timm_eca  # noqa: F401
from timm_eca.fused import native


def saved_bytes(model: nn.Module, size: int = 64) -> int:
    """Bytes kept for the backward pass of one training step: storages, each once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
    return sum(storage.nbytes() for storage in kept.values())


def made(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def test_counts_each_map_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            out = self.conv(x)
            return torch.sigmoid(out) * out

    # The image (3 maps), the convolution's output (4) and the sigmoid's (4), of float32.
    assert saved_bytes(Net()) == 2 * 64 * 64 * (3 + 4 + 4) * 4


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_attention_keeps_no_maps(name):
    # What is kept besides maps does not grow with them: one vector of each sample and block.
    ratio = saved_bytes(made(name, attn_layer="eca"), size=128) / saved_bytes(made(name), size=128)
    assert 1 < ratio <= 1.005


@pytest.mark.parametrize(("compiled_passes", "most"), [(True, 0.72), (False, 1.01)])
def test_clipped_maps_are_kept_once(monkeypatch, compiled_passes, most):
    # PyTorch's ReLU6 in place keeps what it was given as a copy, besides the norm's map and the next convolution's.
    if compiled_passes and not native.loaded():
        pytest.skip("the compiled passes are not built here")
    monkeypatch.setattr(native, "_loaded", compiled_passes)
    ratio = saved_bytes(made("mobilenetv2_100", attn_layer="eca"), 128) / saved_bytes(made("mobilenetv2_100"), 128)
    assert most - 0.02 < ratio <= most


def test_attention_keeps_a_vector():
    model = made("resnet50", attn_layer="eca")
    channels = sum(
        block.bn3.num_features
        for stage in ("layer1", "layer2", "layer3", "layer4")
        for block in model.get_submodule(stage)
    )
    extra = saved_bytes(model) - saved_bytes(made("resnet50"))
    assert extra == 2 * channels * 4


def test_plain_attention_keeps_maps():
    plain, fused = (saved_bytes(made("resnet50", attn_layer="eca", fused=fused)) for fused in (False, True))
    assert plain > 1.1 * fused
    assert plain > 1.1 * saved_bytes(made("resnet50"))

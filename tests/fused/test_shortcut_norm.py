"""In inference the norm that ends a block's downsample is applied where the shortcut is added."""

import pytest
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrize

from fused_models import MODELS, blocks_of, create, pixels, plain_twin, small
from tail_cases import ON_CPU
from timm_eca.fused import forward, fuse_

NAMES = [name for name in MODELS if "resne" in name]


@pytest.fixture
def norms_taken(monkeypatch):
    """For each fused tail, whether it was given a norm of the shortcut."""
    taken = []

    def watch(z, shortcut, weights, *args):
        taken.append(weights.shortcut_norm is not None)
        return tail(z, shortcut, weights, *args)

    tail = forward.fused_tail
    monkeypatch.setattr(forward, "fused_tail", watch)
    return taken


def compare(model: nn.Module, plain: nn.Module, x: torch.Tensor, tolerance: float = 1e-12) -> None:
    with torch.inference_mode():
        actual, expected = model(x), plain(x)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers()):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=name)


def downsamples(model: nn.Module) -> int:
    return sum(getattr(block, "downsample", None) is not None for block in blocks_of(model))


class TestInference:
    @ON_CPU
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("name", NAMES)
    def test_models(self, norms_taken, engine, name, layout):
        model = create(name, **MODELS[name]).double().eval().to(memory_format=layout)
        if name.startswith("eca"):
            fuse_(model)
        for _ in range(2):
            compare(model, plain_twin(model), pixels(3).contiguous(memory_format=layout))
        assert sum(norms_taken) == 2 * downsamples(model) > 0

    @pytest.mark.parametrize("changed", [{"avg_down": True}, {"act_layer": "silu"}], ids=str)
    def test_arguments(self, norms_taken, changed):
        model = small(**changed).double().eval()
        compare(model, plain_twin(model), pixels())
        assert sum(norms_taken) == downsamples(model)

    def test_frozen(self, norms_taken):
        model = freeze_batch_norm_2d(small().double().train())
        compare(model, plain_twin(model), pixels())
        assert sum(norms_taken) == downsamples(model)

    def test_half_precision(self, norms_taken):
        model = small().eval()
        compare(model.bfloat16(), plain_twin(model), pixels(dtype=torch.bfloat16), tolerance=0.05)
        assert sum(norms_taken) == downsamples(model)

    def test_autocast(self, norms_taken):
        model = small().eval()
        with torch.autocast("cpu", torch.bfloat16):
            compare(model, plain_twin(model), pixels(dtype=torch.float32), tolerance=0.05)
        assert sum(norms_taken) == downsamples(model)

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_compile(self, train):
        model = small().double().train(train)
        plain = plain_twin(model)
        torch.compiler.reset()
        compare(torch.compile(model, fullgraph=True, backend="aot_eager"), plain, pixels())


class TestLeft:
    """Where the norm stays with the downsample."""

    def test_with_gradients(self, norms_taken):
        small().eval()(pixels(dtype=torch.float32))
        assert norms_taken
        assert not any(norms_taken)

    def test_statistics_of_the_batch(self, norms_taken):
        model = small().double().train()
        plain = plain_twin(model)
        compare(model, plain, pixels())
        assert not any(norms_taken)

    @pytest.mark.parametrize(
        "change",
        [
            lambda downsample: downsample.append(nn.Tanh()),
            lambda downsample: downsample[-1].train(),
            lambda downsample: parametrize.register_parametrization(downsample[-1], "weight", nn.Softplus()),
            lambda downsample: downsample[-1].register_forward_hook(lambda *args: 2 * args[-1]),
            lambda downsample: downsample.register_forward_hook(lambda *args: 2 * args[-1]),
            lambda downsample: downsample.__setitem__(-1, nn.GroupNorm(1, 48).double()),
            lambda downsample: setattr(downsample, "forward", downsample[0].forward),
            lambda downsample: setattr(downsample[-1], "forward", torch.tanh),
        ],
        ids=["longer", "training", "parametrized", "hooked", "hooked around", "other", "patched", "norm patched"],
    )
    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    def test_changed(self, norms_taken, change, ran):
        model = small(layers=(1, 1, 1, 1)).double().eval()
        model.layer2[0].downsample = nn.Sequential(nn.Conv2d(32, 48, 1, 2), nn.BatchNorm2d(48)).double().eval()
        if ran:
            compare(model, plain_twin(model), pixels())
        plain = plain_twin(model)
        for net in (model, plain):
            change(net.layer2[0].downsample)
        norms_taken.clear()
        compare(model, plain, pixels())
        assert sum(norms_taken) == downsamples(model) - 1

    def test_hook_on_its_convolution(self, norms_taken):
        model = small().eval()
        heard = []
        model.layer2[0].downsample[0].register_forward_hook(lambda *_: heard.append(1))
        compare(model, plain_twin(model), pixels(dtype=torch.float32), tolerance=1e-5)
        assert len(heard) == 2
        assert sum(norms_taken) == downsamples(model)

    def test_shapes_that_do_not_fit(self):
        model = small().eval()
        model.layer2[0].downsample = nn.Sequential(nn.Conv2d(32, 48, 1), nn.BatchNorm2d(48)).eval()
        with torch.no_grad(), pytest.raises(RuntimeError, match="size of tensor"):
            model(pixels(dtype=torch.float32))

import copy

import pytest
import timm
import torch
from timm.layers import BlurPool2d, SyncBatchNormAct, freeze_batch_norm_2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_models import (
    MODELS,
    assert_same,
    blocks_of,
    check_step,
    create,
    pixels,
    plain_twin,
    small,
    step,
)
from timm_eca.fused import fuse_


class TestOracle:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, fused_calls, name, train):
        model = create(name, **MODELS[name]).double().train(train)
        if name.startswith("eca"):
            assert not blocks_of(model)
            fuse_(model)
        check_step(model, pixels(3))
        assert len(fused_calls) == len(blocks_of(model)) > 0

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "changed",
        [
            {"drop_path_rate": 0.5},
            {"act_layer": "silu"},
            {"avg_down": True},
            {"zero_init_last": True},
            {"aa_layer": BlurPool2d},
        ],
        ids=str,
    )
    def test_arguments(self, fused_calls, changed, train):
        model = small(**changed).double().train(train)
        check_step(model)
        assert fused_calls == ["act_layer" not in changed] * len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "changed", [{"momentum": None}, {"momentum": 1.0}, {"momentum": 0.0}, {"eps": 0.1}], ids=str
    )
    def test_norms(self, fused_calls, changed, train):
        model = small().double().train(train)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            vars(norm).update(changed)
        plain = plain_twin(model)
        for _ in range(3):
            assert_same(step(model, pixels()), step(plain, pixels()))
        assert len(fused_calls) == 3 * len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("made", [{"affine": False}, {"track_running_stats": False}], ids=str)
    def test_new_norms(self, fused_calls, made, train):
        model = small().double()
        for block in blocks_of(model):
            block.bn3 = nn.BatchNorm2d(block.bn3.num_features, **made).double()
        check_step(model.train(train))
        assert len(fused_calls) == len(blocks_of(model))

    @pytest.mark.parametrize("compiled_passes", [True, False])
    def test_cumulative_average_of_several_batches(self, fused_calls, monkeypatch, compiled_passes):
        if not compiled_passes:
            monkeypatch.setattr("timm_eca.fused.native._loaded", False)
        model = small().double().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        plain = plain_twin(model)
        for batch in (2, 3, 4):  # of other images each: equal batches have any weights for an average
            actual, expected = step(model, pixels(batch)), step(plain, pixels(batch))
        assert_same(actual, expected)
        assert len(fused_calls) == 3 * len(blocks_of(model))

    def test_statistics_frozen_by_eval(self, fused_calls):
        model = small().double().train()
        for block in blocks_of(model):
            block.bn3.eval()
        check_step(model)
        assert len(fused_calls) == len(blocks_of(model))

    def test_statistics_not_tracked_any_more(self, fused_calls):
        model = small().double().train()
        for block in blocks_of(model):
            block.bn3.track_running_stats = False
        check_step(model)
        assert len(fused_calls) == len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_frozen_norms(self, fused_calls, train):
        model = freeze_batch_norm_2d(small()).double().train(train)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        check_step(model)
        assert len(fused_calls) == len(blocks_of(model))

    @pytest.mark.parametrize(
        "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=["torch", "timm"]
    )
    def test_sync_norms(self, fused_calls, convert):
        model = convert(small()).double()
        assert isinstance(model.layer1[0].bn3, (nn.SyncBatchNorm, SyncBatchNormAct))
        check_step(model.train())
        assert not fused_calls
        check_step(model.eval())
        assert len(fused_calls) == len(blocks_of(model))

    @pytest.mark.parametrize("frozen", ["bn3.weight", "bn3", "se", "layer", "conv3", "everything but se"])
    def test_frozen_weights(self, fused_calls, frozen):
        model = small().double().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((frozen in name) is False if "but" not in frozen else ".se." in name)
        before = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert before
        check_step(model)
        assert len(fused_calls) == len(blocks_of(model))

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_channels_last(self, fused_calls, name, train):
        model = create(name, **MODELS[name]).double().train(train).to(memory_format=torch.channels_last)
        x = pixels().contiguous(memory_format=torch.channels_last)
        check_step(model, x)
        assert len(fused_calls) == len(blocks_of(model))

    def test_without_gradient(self, fused_calls):
        model = small().double().eval()
        plain = plain_twin(model)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(model(pixels()), plain(pixels()), rtol=1e-12, atol=1e-12)
        assert len(fused_calls) == 2 * len(blocks_of(model))

    def test_one_image_in_eval(self, fused_calls):
        check_step(small().double().eval(), pixels(1, 32))
        assert fused_calls

    def test_one_value_in_training_is_batch_norms_error(self):
        model = small().train()
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(pixels(1, 32, torch.float32))

    def test_float32(self, fused_calls):
        check_step(small().train(), pixels(4, dtype=torch.float32), tolerance=1e-4)
        assert fused_calls

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_autocast(self, fused_calls, train):
        model = small().train(train)
        plain, x = plain_twin(model), pixels(4, dtype=torch.float32)
        exact = step(copy.deepcopy(plain).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = step(model, x), step(plain, x)
        assert len(fused_calls) == len(blocks_of(model))
        for kind in ("outputs", "grads"):
            assert all(ours[kind][name].dtype == theirs[kind][name].dtype for name in exact[kind])
            errors = [
                sum((found[kind][name].double() - tensor).square().sum() for name, tensor in exact[kind].items()).sqrt()
                for found in (ours, theirs)
            ]
            assert errors[0] <= 1.3 * errors[1], kind

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, fused_calls, reentrant):
        model = small(drop_path_rate=0.5).double().train()
        count = len(blocks_of(model))

        class Checkpointed(nn.Module):
            def __init__(self, body):
                super().__init__()
                self.body = body

            def forward(self, x):
                return checkpoint(self.body, x, use_reentrant=reentrant)

        model = Checkpointed(model)
        check_step(model)
        assert len(fused_calls) == 2 * count

    def test_grad_checkpointing_of_timm(self, fused_calls):
        model = small(drop_path_rate=0.5).double().train()
        expected = step(plain_twin(model), pixels())
        model.set_grad_checkpointing()
        actual = step(model, pixels())
        del actual["buffers"], expected["buffers"]  # statistics are updated by both passes
        assert_same(actual, expected)
        assert len(fused_calls) == 2 * len(blocks_of(model))

    def test_double_backward(self, fused_calls):
        model = small().double().eval()
        found = []
        for net in (model, plain_twin(model)):
            x = pixels(1, 32).requires_grad_()
            (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            grad.square().sum().backward()
            found.append(
                {"grads": {"input": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}}
            )
        assert_same(*found, tolerance=1e-11)
        assert fused_calls

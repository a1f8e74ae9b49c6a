import copy
import pickle

import pytest
import timm
import torch
from timm.layers import BlurPool2d, SEModule, SyncBatchNormAct, freeze_batch_norm_2d
from timm.utils import ModelEmaV3
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import timm_eca
from conftest import randomize_
from timm_eca.fused import blocks, fuse_, unfuse_
from timm_eca.fused.blocks import RULES, FusedBlock
from timm_eca.fused.halves import halves_of

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
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


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(timm.create_model(name, **kwargs))


def small(**kwargs) -> nn.Module:
    """Bottlenecks, of which one has no downsample."""
    return create("resnet26", **{**SMALL, **kwargs})


def plain_twin(model: nn.Module) -> nn.Module:
    return unfuse_(copy.deepcopy(model))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@pytest.fixture
def calls(monkeypatch):
    """The calls of fused tails, each by whether a ReLU ended it."""
    made = []

    def count(*args):
        made.append(args[3])
        return tail(*args)

    tail = blocks.fused_tail
    monkeypatch.setattr(blocks, "fused_tail", count)
    return made


def pixels(batch: int = 2, size: int = 64, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """All that one step gives: outputs, gradients, buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
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


class TestOracle:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, calls, name, train):
        model = create(name, **MODELS[name]).double().train(train)
        if name.startswith("eca"):
            assert not blocks_of(model)
            fuse_(model)
        check_step(model, pixels(3))
        assert len(calls) == len(blocks_of(model)) > 0

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
    def test_arguments(self, calls, changed, train):
        model = small(**changed).double().train(train)
        check_step(model)
        assert calls == ["act_layer" not in changed] * len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize(
        "changed", [{"momentum": None}, {"momentum": 1.0}, {"momentum": 0.0}, {"eps": 0.1}], ids=str
    )
    def test_norms(self, calls, changed, train):
        model = small().double().train(train)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            vars(norm).update(changed)
        plain = plain_twin(model)
        for _ in range(3):
            assert_same(step(model, pixels()), step(plain, pixels()))
        assert len(calls) == 3 * len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("made", [{"affine": False}, {"track_running_stats": False}], ids=str)
    def test_new_norms(self, calls, made, train):
        model = small().double()
        for block in blocks_of(model):
            block.bn3 = nn.BatchNorm2d(block.bn3.num_features, **made).double()
        check_step(model.train(train))
        assert len(calls) == len(blocks_of(model))

    @pytest.mark.parametrize("compiled_passes", [True, False])
    def test_cumulative_average_of_several_batches(self, calls, monkeypatch, compiled_passes):
        if not compiled_passes:
            monkeypatch.setattr("timm_eca.fused.native._library", dict)
        model = small().double().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        plain = plain_twin(model)
        for batch in (2, 3, 4):  # of other images each: equal batches have any weights for an average
            actual, expected = step(model, pixels(batch)), step(plain, pixels(batch))
        assert_same(actual, expected)
        assert len(calls) == 3 * len(blocks_of(model))

    def test_statistics_frozen_by_eval(self, calls):
        model = small().double().train()
        for block in blocks_of(model):
            block.bn3.eval()
        check_step(model)
        assert len(calls) == len(blocks_of(model))

    def test_statistics_not_tracked_any_more(self, calls):
        model = small().double().train()
        for block in blocks_of(model):
            block.bn3.track_running_stats = False
        check_step(model)
        assert len(calls) == len(blocks_of(model))

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_frozen_norms(self, calls, train):
        model = freeze_batch_norm_2d(small()).double().train(train)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        check_step(model)
        assert len(calls) == len(blocks_of(model))

    @pytest.mark.parametrize(
        "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=["torch", "timm"]
    )
    def test_sync_norms(self, calls, convert):
        model = convert(small()).double()
        assert isinstance(model.layer1[0].bn3, (nn.SyncBatchNorm, SyncBatchNormAct))
        check_step(model.train())
        assert not calls
        check_step(model.eval())
        assert len(calls) == len(blocks_of(model))

    @pytest.mark.parametrize("frozen", ["bn3.weight", "bn3", "se", "layer", "conv3", "everything but se"])
    def test_frozen_weights(self, calls, frozen):
        model = small().double().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((frozen in name) is False if "but" not in frozen else ".se." in name)
        before = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert before
        check_step(model)
        assert len(calls) == len(blocks_of(model))

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_channels_last(self, calls, name, train):
        model = create(name, **MODELS[name]).double().train(train).to(memory_format=torch.channels_last)
        x = pixels().contiguous(memory_format=torch.channels_last)
        check_step(model, x)
        assert len(calls) == len(blocks_of(model))

    def test_without_gradient(self, calls):
        model = small().double().eval()
        plain = plain_twin(model)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                torch.testing.assert_close(model(pixels()), plain(pixels()), rtol=1e-12, atol=1e-12)
        assert len(calls) == 2 * len(blocks_of(model))

    def test_one_image_in_eval(self, calls):
        check_step(small().double().eval(), pixels(1, 32))
        assert calls

    def test_one_value_in_training_is_batch_norms_error(self):
        model = small().train()
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(pixels(1, 32, torch.float32))

    def test_float32(self, calls):
        check_step(small().train(), pixels(4, dtype=torch.float32), tolerance=1e-4)
        assert calls

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_autocast(self, calls, train):
        model = small().train(train)
        plain, x = plain_twin(model), pixels(4, dtype=torch.float32)
        exact = step(copy.deepcopy(plain).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = step(model, x), step(plain, x)
        assert len(calls) == len(blocks_of(model))
        for kind in ("outputs", "grads"):
            assert all(ours[kind][name].dtype == theirs[kind][name].dtype for name in exact[kind])
            errors = [
                sum((found[kind][name].double() - tensor).square().sum() for name, tensor in exact[kind].items()).sqrt()
                for found in (ours, theirs)
            ]
            assert errors[0] <= 1.3 * errors[1], kind

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, calls, reentrant):
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
        assert len(calls) == 2 * count

    def test_grad_checkpointing_of_timm(self, calls):
        model = small(drop_path_rate=0.5).double().train()
        expected = step(plain_twin(model), pixels())
        model.set_grad_checkpointing()
        actual = step(model, pixels())
        del actual["buffers"], expected["buffers"]  # statistics are updated by both passes
        assert_same(actual, expected)
        assert len(calls) == 2 * len(blocks_of(model))

    def test_double_backward(self, calls):
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
        assert calls


class TestDoors:
    def test_default_and_off(self):
        assert blocks_of(timm.create_model("resnet18", attn_layer="eca"))
        assert not blocks_of(timm.create_model("resnet18", attn_layer="eca", fused=False))
        assert blocks_of(timm_eca.add_attn_(timm.create_model("resnet18"), "eca"))
        assert not blocks_of(timm_eca.add_attn_(timm.create_model("resnet18"), "eca", fused=False))

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_unfuse_restores_classes(self, name):
        plain, fused = (timm.create_model(name, attn_layer="eca", fused=fused) for fused in (False, True))
        kinds = [type(m) for m in plain.modules()]
        assert [type(m) for m in fused.modules()] != kinds
        assert unfuse_(fused) is fused
        assert [type(m) for m in fused.modules()] == kinds
        assert fuse_(fused) is fused
        assert len(blocks_of(fused)) == len(blocks_of(timm.create_model(name, attn_layer="eca")))

    def test_fuse_twice(self):
        model = timm.create_model("resnet18", attn_layer="eca")
        kinds = [type(m) for m in model.modules()]
        assert [type(m) for m in fuse_(model).modules()] == kinds

    @pytest.mark.parametrize("name", ["resnet18", "seresnet18", "convnext_atto"])
    def test_nothing_to_fuse(self, name):
        with pytest.raises(ValueError, match=r"no block that can be fused.*BasicBlock, Bottleneck.*InvertedResidual"):
            fuse_(timm.create_model(name, num_classes=0))

    def test_reads_as_before(self):
        model = small()
        plain = plain_twin(model)
        assert repr(model) == repr(plain)
        assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
        assert isinstance(model.layer1[0], timm.models.resnet.Bottleneck)

    @pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
    def test_rule_fits_timm(self, cls):
        name = {"BasicBlock": "resnet18", "EdgeResidual": "efficientnet_es"}.get(cls.__name__, "mobilenetv2_050")
        name = "resnet26" if cls.__name__ == "Bottleneck" else name
        with torch.device("meta"):
            model = timm.create_model(name, attn_layer="eca", fused=False)
        kinds = {type(m) for m in model.modules() if isinstance(m, cls)}
        kinds = {kind for kind in kinds if getattr(kind, "_made_from", (kind,))[0] is cls}
        assert kinds, f"{name} has no {cls.__name__} any more"
        for kind in kinds:
            assert halves_of(kind, RULES[cls]) is not None, (
                f"timm's {cls.__name__}.forward is no longer as its rule says"
            )

    def test_state_dict(self):
        model = small()
        plain = plain_twin(model)
        assert list(model.state_dict()) == list(plain.state_dict())
        other = plain_twin(randomize_(model, seed=1))
        assert model.load_state_dict(plain.state_dict()).missing_keys == []
        assert torch.equal(model.layer1[0].bn3.weight, plain.layer1[0].bn3.weight)
        plain.load_state_dict(other.state_dict())
        assert torch.equal(plain.layer1[0].bn3.weight, other.layer1[0].bn3.weight)

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: ModelEmaV3(m).module]
    )
    def test_copies(self, calls, copied, ran, name):
        model = create(name, **MODELS[name]).double().eval()
        if ran:
            step(model, pixels(1))
        other = copied(model)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        count = len(calls)
        assert torch.equal(other.eval()(pixels(1)), model(pixels(1)))
        assert len(calls) == count + 2 * len(blocks_of(model))

    def test_copy_is_its_own(self):
        model = small().eval()
        before = model(pixels(1, dtype=torch.float32))
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert torch.equal(model(pixels(1, dtype=torch.float32)), before)
        assert not torch.equal(other(pixels(1, dtype=torch.float32)), before)

    def test_ema_follows(self, calls):
        model = small().train()
        ema = ModelEmaV3(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, pixels(dtype=torch.float32))
        optimizer.step()
        ema.update(model)
        torch.testing.assert_close(
            ema.module.state_dict()["layer1.0.bn3.running_mean"] * 2 - model.layer1[0].bn3.running_mean,
            small().layer1[0].bn3.running_mean,
        )
        assert len(calls) == len(blocks_of(model))


class TestIdentityStart:
    def test_bit_equal_then_fused(self, calls):
        backbone = create("resnet18", num_classes=7).eval()
        model = timm.create_model("resnet18", attn_layer="eca", attn_init="identity", num_classes=7).eval()
        model.load_state_dict(backbone.state_dict())
        x = pixels(2, dtype=torch.float32)
        assert torch.equal(model(x), backbone(x))
        assert not calls
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        check_step(model.train(), x, tolerance=1e-4)
        assert not calls
        optimizer.step()
        check_step(model, x, tolerance=1e-4)
        assert len(calls) == len(blocks_of(model))
        assert all(block._zero_kernel is False for block in blocks_of(model))


class TestTools:
    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    def test_script(self, calls, ran):
        model = small().eval()
        x = pixels(dtype=torch.float32)
        if ran:
            model(x)
            calls.clear()
        assert torch.equal(torch.jit.script(model)(x), plain_twin(model)(x))
        assert not calls

    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    def test_trace(self, calls, ran):
        model = small().eval()
        x = pixels(dtype=torch.float32)
        if ran:
            model(x)
            calls.clear()
        assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), plain_twin(model)(x))
        assert not calls

    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    def test_symbolic_trace(self, calls, ran):
        model = small().eval()
        x = pixels(dtype=torch.float32)
        if ran:
            model(x)
            calls.clear()
        traced = torch.fx.symbolic_trace(model)
        assert {"layer1.0.bn3", "layer1.0.se.conv"} <= {node.target for node in traced.graph.nodes}
        assert torch.equal(traced(x), plain_twin(model)(x))
        assert not calls

    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    @pytest.mark.parametrize("strict", [True, False])
    def test_export_keeps_norms(self, calls, ran, strict):
        model = small().eval()
        x = pixels(dtype=torch.float32)
        if ran:
            model(x)
            calls.clear()
        program = torch.export.export(model, (x,), strict=strict)
        norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
        assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(program.module()(x), plain_twin(model)(x))
        assert not calls

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_compile(self, train):
        model = small(layers=(1, 2)[:1] * 3 + (2,)).double().train(train)
        plain = plain_twin(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual, expected = step(compiled, pixels()), step(plain, pixels())
        actual = {kind: {n.removeprefix("_orig_mod."): t for n, t in ts.items()} for kind, ts in actual.items()}
        assert_same(actual, expected)

    @pytest.mark.skipif(TORCH < (2, 15), reason="the compiler of PyTorch 2.8 calls forward: the plain path")
    def test_compiled_tails_have_no_norm(self):
        model = small().eval()
        graphs = []
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        x = pixels(dtype=torch.float32)
        torch.testing.assert_close(compiled(x), plain_twin(model)(x), rtol=1e-4, atol=1e-5)
        (graph,) = graphs
        norms = sum("batch_norm" in str(node.target) for node in graph.graph.nodes)
        assert norms == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) - len(blocks_of(model))

    def test_compile_of_a_block(self):
        model = small().eval()
        x = pixels(dtype=torch.float32)
        expected = plain_twin(model)(x)
        graphs = []
        torch._dynamo.reset()
        model.layer2[1].compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_copies_of_a_compiled_block(self, name):
        model = create(name, **MODELS[name])
        block = blocks_of(model)[0]
        block.compile(backend="eager")
        assert copy.deepcopy(block)._compiled_call_impl is None
        assert type(pickle.loads(pickle.dumps(model))) is type(model)

    @pytest.mark.parametrize("ran", [True, False], ids=["after a step", "new"])
    def test_replica(self, ran):
        model = small().double().eval()
        x = torch.randn(2, 48, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        outputs = []
        for net in (model, plain_twin(model)):
            block = net.layer2[1]
            if ran:
                block(x)
            # As DataParallel makes one for another device: the dictionaries copied, with modules of its own.
            replica = block._replicate_for_data_parallel()
            replica._modules = {name: copy.deepcopy(module) for name, module in block._modules.items()}
            replica.bn3.weight.data *= 3
            outputs.append(replica(x))
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)

    def test_meta(self, calls):
        model = small().to("meta")
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
        assert not calls

    def test_flop_counter(self, calls):
        model = small().eval()
        counts = []
        for net in (model, plain_twin(model)):
            with FlopCounterMode(display=False) as counter:
                net(pixels(dtype=torch.float32))
            counts.append(counter.get_flop_counts())
        assert counts[0] == counts[1]
        assert not calls

    def test_function_mode(self, calls):
        seen = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        model = small().eval()
        with Watch():
            model(pixels(dtype=torch.float32))
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert seen.count(nn.functional.batch_norm) == norms
        assert not calls

    def test_distributed(self, calls, tmp_path):
        from torch import distributed

        model = small(drop_path_rate=0.3).double().train()
        plain = plain_twin(model)
        distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            actual = step(wrapped, pixels())
        finally:
            distributed.destroy_process_group()
        actual = {kind: {n.removeprefix("module."): t for n, t in ts.items()} for kind, ts in actual.items()}
        assert_same(actual, step(plain, pixels()))
        assert len(calls) == len(blocks_of(model))

    def test_step_without_library(self, run_python):
        code = (
            "import timm, torch, timm_eca; from timm_eca.fused import native, blocks; native._library = dict\n"
            "calls = []; tail = blocks.fused_tail; blocks.fused_tail = lambda *a: calls.append(1) or tail(*a)\n"
            "torch.manual_seed(0); model = timm.create_model('resnet18', attn_layer='eca')\n"
            "optimizer = torch.optim.SGD(model.parameters(), 0.01); x, y = torch.randn(4, 3, 64, 64), torch.arange(4)\n"
            "for _ in range(2):\n"
            "    loss = torch.nn.functional.cross_entropy(model(x), y)\n"
            "    optimizer.zero_grad(); loss.backward(); optimizer.step(); print(len(calls), loss.item())\n"
        )
        (count, first), (_, second) = (line.split() for line in run_python(code).splitlines())
        assert int(count) == 8
        assert float(second) < float(first)


class TestTransforms:
    """Transforms of single operations see the plain ones."""

    @pytest.fixture
    def net(self):
        model = small().double().eval()
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(net, parameters, x):
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

        return model, plain_twin(model), parameters, loss

    def test_functional_call(self, calls, net):
        model, plain, parameters, loss = net
        parameters = {name: 1.5 * p for name, p in parameters.items()}
        x = pixels(2, 32)
        torch.testing.assert_close(loss(model, parameters, x), loss(plain, parameters, x), rtol=1e-12, atol=0)

    def test_grad(self, calls, net):
        model, plain, parameters, loss = net
        actual, expected = (torch.func.grad(loss, 1)(m, parameters, pixels(2, 32)) for m in (model, plain))
        assert_same({"grads": actual}, {"grads": expected})
        assert not calls

    def test_gradients_of_samples(self, calls, net):
        model, plain, parameters, loss = net
        found = []
        for m in (model, plain):
            grad = torch.func.grad(lambda p, x, m=m: loss(m, p, x[None]))
            found.append({"grads": torch.func.vmap(grad, (None, 0))(parameters, pixels(2, 32))})
        assert_same(*found)
        assert not calls

    def test_forward_mode(self, calls, net):
        model, plain, *_ = net
        x, tangent = pixels(1, 32), pixels(1, 32).flip(3)
        actual, expected = (torch.func.jvp(m, (x,), (tangent,))[1] for m in (model, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(dual, expected, rtol=1e-12, atol=1e-12)
        assert not calls

    @pytest.mark.parametrize("compiled_passes", [True, False])
    def test_batch_of_cotangents(self, monkeypatch, net, compiled_passes):
        if not compiled_passes:
            monkeypatch.setattr("timm_eca.fused.tail.native.takes", lambda *_: False)
        found = []
        for m in net[:2]:
            x = pixels(2, 32).requires_grad_()
            out = m(x)
            cotangents = torch.eye(out.numel(), dtype=out.dtype)[:3].view(3, *out.shape)
            found.append(torch.autograd.grad(out, x, cotangents, is_grads_batched=True)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class TestHooks:
    @pytest.fixture
    def model(self):
        return small().double().eval()

    # A backward hook where something is written to in place afterwards is PyTorch's error on the plain path too.
    @pytest.mark.parametrize(
        ("kind", "place"),
        [
            (kind, place)
            for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
            for place in ("conv3", "bn3", "se", "se.conv", "se.gate", "act3", "")
            if not ("backward" in kind and place in ("se", "act3"))
        ],
    )
    def test_called(self, calls, model, kind, place):
        expected = step(plain_twin(model), pixels(1))
        step(model, pixels(1))
        count, heard = len(calls), []
        assert count == len(blocks_of(model))
        module = model.layer2[1].get_submodule(place)
        handle = getattr(module, f"register_{kind}")(lambda *args: heard.append(args[0]))
        assert_same(step(model, pixels(1)), expected)
        assert heard == [module]
        assert len(calls) == 2 * count - 1
        handle.remove()
        assert_same(step(model, pixels(1)), expected)
        assert heard == [module]
        assert len(calls) == 3 * count - 1

    def test_changes_what_comes_next(self, calls, model):
        model(pixels(1))
        before = len(calls)
        model.layer2[1].bn3.register_forward_hook(lambda module, args, out: 2 * out)
        check_step(model)
        assert len(calls) == 2 * before - 1

    @pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
    def test_on_all_modules(self, calls, register):
        model = create("mobilenetv2_050", **ECA).double().eval()
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        heard = set()
        handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *_: heard.add(module))
        try:
            step(model, pixels(1))
        finally:
            handle.remove()
        norms = {module for name, module in model.named_modules() if name.endswith(("bn1", "bn2", "bn3"))}
        assert {*norms, *blocks_of(model), *timm_eca.attn_modules(model).values()} <= heard
        assert not calls
        step(model, pixels(1))
        assert len(calls) == len(blocks_of(model))

    def test_downsample(self, calls, model):
        heard = []
        model.layer2[0].downsample.register_forward_hook(lambda *_: heard.append(1))
        check_step(model)
        assert heard
        assert calls


CHANGES = {
    "act": lambda block: setattr(block, "act3", nn.GELU()),
    "no act": lambda block: setattr(block, "act3", nn.Identity()),
    "in place act": lambda block: setattr(block, "act3", nn.Hardtanh(0, 0.5, inplace=True)),
    "attn": lambda block: setattr(block, "se", SEModule(48, rd_channels=4).double()),
    "no attn": lambda block: setattr(block, "se", None),
    "gate": lambda block: setattr(block.se, "gate", nn.Tanh()),
    "kernel": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 9, padding=4, bias=False).double()),
    "dilated": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False).double()),
    "biased": lambda block: setattr(block.se, "conv", nn.Conv1d(1, 1, 3, padding=1).double()),
    "norm": lambda block: setattr(block, "bn3", nn.GroupNorm(4, 48).double()),
    "no norm": lambda block: setattr(block, "bn3", nn.Identity()),
    "conv": lambda block: setattr(block, "conv3", nn.Sequential(block.conv3, nn.Tanh())),
    "drop path": lambda block: setattr(block, "drop_path", nn.Dropout(0.5)),
    "downsample": lambda block: setattr(block, "downsample", nn.Conv2d(48, 48, 1).double()),
    "new kernel": lambda block: setattr(block.se.conv, "weight", nn.Parameter(torch.ones(1, 1, 3).double())),
    "new weight": lambda block: setattr(block.bn3, "weight", nn.Parameter(torch.full((48,), 3.0).double())),
    "pruned": lambda block: prune.l1_unstructured(block.bn3, "weight", 0.5),
    "parametrized norm": lambda block: parametrize.register_parametrization(block.bn3, "weight", nn.Softplus()),
    "parametrized kernel": lambda block: parametrize.register_parametrization(block.se.conv, "weight", nn.Tanh()),
    "forward of act": lambda block: setattr(block.act3, "forward", torch.tanh),
    "forward of norm": lambda block: setattr(block.bn3, "forward", torch.tanh),
    "forward of attn": lambda block: setattr(block.se, "forward", lambda x: 2 * x),
    "forward of block": lambda block: setattr(block, "forward", torch.tanh),
}


class TestReplaced:
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_takes_effect(self, calls, change, train):
        model = small().double().train(train)
        before = step(model, pixels())["outputs"][""]
        plain = plain_twin(model)
        for net in (model, plain):
            torch.manual_seed(5)
            CHANGES[change](net.layer2[1])
        actual = step(model, pixels())
        assert not torch.equal(actual["outputs"][""], before)
        assert_same(actual, step(plain, pixels()))
        assert len(calls) >= 2 * len(blocks_of(model)) - 1

    def test_forward_of_a_class(self, calls, monkeypatch):
        model = small().eval()
        monkeypatch.setattr(timm.models.resnet.Bottleneck, "forward", lambda block, x: 0 * x)
        assert not model.layer4(torch.randn(2, 64, 4, 4)).any()

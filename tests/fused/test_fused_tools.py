import copy
import pickle

import pytest
import torch
from timm.layers import DropPath, freeze_batch_norm_2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fused_models import (
    MODELS,
    assert_same,
    blocks_of,
    compiler_calls_blocks,
    create,
    pixels,
    plain_twin,
    short,
    small,
    step,
)

REPLACED = {
    "gate": lambda block: setattr(block.attn_last, "gate", nn.Tanh()),
    "drop path": lambda block: setattr(block, "drop_path", DropPath(0.5)),
    "activation inside": lambda block: setattr(getattr(block, block._rule.inner[-1].norm), "act", nn.ReLU()),
    "last of the first half": lambda block: setattr(block, "se", nn.Tanh()),
    "norm": lambda block: setattr(block, block._rule.norm, freeze_batch_norm_2d(getattr(block, block._rule.norm))),
}


class TestTools:
    @pytest.fixture(params=[True, False], ids=["after a step", "new"])
    def net(self, request, fused_calls):
        """A model, one that has run or a new one, and its input."""
        model, x = small().eval(), pixels(dtype=torch.float32)
        if request.param:
            model(x)
            assert fused_calls
            fused_calls.clear()
        return model, x

    def test_script(self, fused_calls, net):
        model, x = net
        assert torch.equal(torch.jit.script(model)(x), plain_twin(model)(x))
        assert not fused_calls

    def test_trace(self, fused_calls, net):
        model, x = net
        assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), plain_twin(model)(x))
        assert not fused_calls

    def test_symbolic_trace(self, fused_calls, net):
        model, x = net
        traced = torch.fx.symbolic_trace(model)
        assert {"layer1.0.bn3", "layer1.0.se.conv"} <= {node.target for node in traced.graph.nodes}
        assert torch.equal(traced(x), plain_twin(model)(x))
        assert not fused_calls

    @pytest.mark.parametrize("strict", [True, False])
    def test_export_keeps_norms(self, fused_calls, net, strict):
        model, x = net
        program = torch.export.export(model, (x,), strict=strict)
        norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
        assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(program.module()(x), plain_twin(model)(x))
        assert not fused_calls

    @pytest.mark.parametrize("small_maps", [0, 1 << 40], ids=["operators", "loops"])
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_compile(self, monkeypatch, train, small_maps):
        monkeypatch.setattr("timm_eca.fused.tail._SMALL", small_maps)
        monkeypatch.setattr("timm_eca.fused.tail._SMALL_INFERENCE", small_maps)
        model = small(layers=(1, 2)[:1] * 3 + (2,)).double().train(train)
        plain = plain_twin(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual, expected = step(compiled, pixels()), step(plain, pixels())
        actual = {kind: {n.removeprefix("_orig_mod."): t for n, t in ts.items()} for kind, ts in actual.items()}
        assert_same(actual, expected)

    @compiler_calls_blocks
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

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("place", REPLACED)
    def test_compiled_block_gets_another_module(self, all_maps_large, place, train):
        model = short().double().train(train)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        compiled(pixels())
        for block in blocks_of(model):
            REPLACED[place](block)
        plain = plain_twin(model)
        torch.manual_seed(0)
        actual = compiled(pixels())
        torch.manual_seed(0)
        torch.testing.assert_close(actual, plain(pixels()), rtol=1e-9, atol=1e-9)

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

    def test_meta(self, fused_calls):
        model = small().to("meta")
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
        assert not fused_calls

    def test_flop_counter(self, fused_calls):
        model = small().eval()
        counts = []
        for net in (model, plain_twin(model)):
            with FlopCounterMode(display=False) as counter:
                net(pixels(dtype=torch.float32))
            counts.append(counter.get_flop_counts())
        assert counts[0] == counts[1]
        assert not fused_calls

    def test_function_mode(self, fused_calls):
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
        assert not fused_calls

    def test_distributed(self, fused_calls, tmp_path):
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
        assert len(fused_calls) == len(blocks_of(model))

    def test_step_without_library(self, run_python):
        code = (
            "import timm, torch, timm_eca; from timm_eca.fused import native, forward; native._loaded = False\n"
            "calls = []; tail = forward.fused_tail; forward.fused_tail = lambda *a: calls.append(1) or tail(*a)\n"
            "torch.manual_seed(0); model = timm.create_model('resnet18', attn_layer='eca')\n"
            "optimizer = torch.optim.SGD(model.parameters(), 0.01); x, y = torch.randn(4, 3, 64, 64), torch.arange(4)\n"
            "for _ in range(2):\n"
            "    loss = torch.nn.functional.cross_entropy(model(x), y)\n"
            "    optimizer.zero_grad(); loss.backward(); optimizer.step(); print(len(calls), loss.item())\n"
        )
        (count, first), (_, second) = (line.split() for line in run_python(code).splitlines())
        assert int(count) == 8
        assert float(second) < float(first)

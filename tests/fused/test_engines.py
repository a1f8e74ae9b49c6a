import pytest
import torch
from timm.layers import EcaModule
from torch import nn

from fused_models import blocks_of, small
from tail_cases import ON_CPU, Case, make, plain_out, tail_of, weights_of
from timm_eca.fused import gpu, native, passes, tail
from timm_eca.fused.eligible import find_parts
from timm_eca.fused.tail import fused_tail

BY_ENGINE = {"native": native, "gpu": gpu, "passes": passes}


class TestEngines:
    @pytest.fixture
    def taken(self, monkeypatch):
        calls = []
        for name, module in BY_ENGINE.items():
            for kind in ("forward", "backward"):
                original = getattr(module, kind)
                monkeypatch.setattr(
                    module, kind, lambda *args, _o=original, _k=(name, kind), **kw: calls.append(_k) or _o(*args, **kw)
                )
        return calls

    def test_fixture_chooses(self, engine, taken):
        tail_of(Case(), make(Case(), torch.float32))
        assert taken == [(engine, "forward"), (engine, "backward")]

    @pytest.mark.parametrize(
        ("dtype", "vectors"),
        [
            (torch.float32, None),
            (torch.float64, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_compiled_passes_taken(self, taken, dtype, vectors):
        if not native.loaded():
            pytest.skip("the compiled passes are not built here")
        made = make(Case(), dtype, vectors)
        fused_tail(made["z"], made["shortcut"], weights_of(Case(), made, made)[0], True)
        assert taken == [("native", "forward")]

    @pytest.mark.parametrize("gate", [nn.Sigmoid(), EcaModule(8).gate], ids=["torch", "timm"])
    def test_sigmoids_are_known(self, gate):
        block = blocks_of(small())[0]
        block.se.gate = gate
        assert find_parts(block, block._rule).gate is torch.sigmoid
        block.se.gate = nn.Tanh()
        assert find_parts(block, block._rule).gate is block.se.gate

    @pytest.mark.parametrize(
        ("dtype", "vectors", "gate"),
        [
            (torch.bfloat16, torch.float64, torch.sigmoid),
            (torch.float16, torch.float32, torch.sigmoid),
            (torch.float32, torch.float64, torch.sigmoid),
            (torch.float32, torch.float32, nn.Hardsigmoid()),
        ],
    )
    def test_compiled_passes_left(self, taken, dtype, vectors, gate):
        made = make(Case(), dtype, vectors)
        fused_tail(made["z"], made["shortcut"], weights_of(Case(), made, made, gate)[0], True)
        assert taken == [("passes", "forward")]

    def test_compiled_passes_left_for_strided_vectors(self, taken):
        made = make(Case(), torch.float32)
        made["weight"] = torch.stack([made["weight"], made["weight"]], 1)[:, 0]
        weights, _ = weights_of(Case(), made, made)
        expected, _ = plain_out(Case(), made, made, relu=True)
        torch.testing.assert_close(fused_tail(made["z"], made["shortcut"], weights, True), expected)
        assert taken == [("passes", "forward")]

    def test_without_library(self, monkeypatch):
        monkeypatch.setattr(native, "_functions", {})
        assert not native.loaded()
        assert (
            tail.engine_of(
                torch.ones(1, 1, 1, 1),
                None,
                weights_of(Case(), make(Case(), torch.float32), make(Case(), torch.float32))[0],
            )
            is passes
        )

    @ON_CPU
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_deterministic(self, engine, threads, train):
        case = Case((5, 130, 9, 8), train=train)
        made = make(case, torch.float32)
        first, again = tail_of(case, made), tail_of(case, made)
        assert all(torch.equal(first[name], again[name]) for name in first)

import pytest
import torch
from timm.layers import EcaModule
from torch import nn

from fused_models import blocks_of, small
from tail_cases import ON_CPU, Case, make, plain_out, tail_of, weights_of
from timm_eca.fused import gpu, native, passes
from timm_eca.fused.eligible import find_parts
from timm_eca.fused.tail import fused_tail

BY_ENGINE = {"native": native, "gpu": gpu, "passes": passes}


class TestEngines:
    @pytest.fixture
    def taken(self, monkeypatch):
        """The passes that took a tail, and whose backward ones were called."""
        calls = []

        def watched(function, name, kind):
            def call(*args, **kwargs):
                made = function(*args, **kwargs)
                calls.extend([] if made is None else [(name, kind)])
                return made

            return call

        for name, module in BY_ENGINE.items():
            backward = "gradients_of" if module is native else "backward"
            for attribute, kind in (("forward", "forward"), (backward, "backward")):
                monkeypatch.setattr(module, attribute, watched(getattr(module, attribute), name, kind))
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

    @pytest.mark.parametrize("compiled_passes", [True, False])
    def test_strided_vectors(self, taken, monkeypatch, compiled_passes):
        monkeypatch.setattr(native, "_loaded", compiled_passes and native.loaded())
        made = make(Case(), torch.float32)
        made["weight"] = torch.stack([made["weight"], made["weight"]], 1)[:, 0]
        weights, _ = weights_of(Case(), made, made)
        expected, _ = plain_out(Case(), made, made, relu=True)
        torch.testing.assert_close(fused_tail(made["z"], made["shortcut"], weights, True), expected)
        assert taken == [("native" if native.loaded() else "passes", "forward")]

    def test_without_library(self, monkeypatch, taken):
        monkeypatch.setattr(native, "_loaded", False)
        assert not native.loaded()
        made = make(Case(), torch.float32)
        fused_tail(made["z"], made["shortcut"], weights_of(Case(), made, made)[0], True)
        assert taken == [("passes", "forward")]

    @ON_CPU
    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_deterministic(self, engine, threads, train):
        case = Case((5, 130, 9, 8), train=train)
        made = make(case, torch.float32)
        first, again = tail_of(case, made), tail_of(case, made)
        assert all(torch.equal(first[name], again[name]) for name in first)

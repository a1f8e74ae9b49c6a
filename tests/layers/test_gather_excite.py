import inspect
import sys

import pytest
import timm.layers
import torch
from timm.layers import gather_excite

import timm_eca
from timm_eca.layers.gather_excite import GatherExcite

ARGUMENTS = [
    {},
    {"add_maxpool": True},
    {"extent": 4, "add_maxpool": True},
    {"extra_params": True, "extent": 4, "rd_channels": 3},
    {"extra_params": True, "extent": 2, "norm_layer": None, "use_mlp": False},
    {"rd_ratio": 0.3, "rd_divisor": 8},
    {"extra_params": True, "feat_size": (8, 6), "act_layer": "silu", "gate_layer": "hard_sigmoid"},
]


def as_timm_means_it(channels, **kwargs):
    """timm's class, with the one slip in its source mended."""
    source = inspect.getsource(gather_excite.GatherExcite).replace(", *dd", ", **dd")
    namespace = dict(vars(sys.modules[gather_excite.__name__]))
    exec(source, namespace)
    return namespace["GatherExcite"](channels, **kwargs)


@pytest.mark.parametrize("kwargs", ARGUMENTS)
def test_is_timms(kwargs):
    theirs, ours = as_timm_means_it(32, **kwargs).eval(), GatherExcite(32, **kwargs).eval()
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    assert [type(m) for m in list(theirs.modules())[1:]] == [type(m) for m in list(ours.modules())[1:]]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, 8, 6)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(torch.jit.script(ours)(x), theirs(x))


def test_by_name():
    assert isinstance(timm.layers.create_attn("ge", 64), GatherExcite)
    assert isinstance(timm.layers.create_attn("ge", 64), timm.layers.GatherExcite)
    model = timm.create_model("resnet18", attn_layer="ge", dtype=torch.bfloat16, device="meta")
    assert {type(m) for m in timm_eca.attn_modules(model).values()} == {GatherExcite}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"extent": 3}, "extent must be 0 .* or a power of two from 2 on, got 3"),
        ({"extent": -2}, "extent must be 0 .* got -2"),
        ({"extent": 2.0}, "extent must be 0 .* got 2.0"),
        ({"extra_params": True}, "needs feat_size"),
        ({"act_layer": "nonsense"}, "act_layer must be the name of a timm activation .* got 'nonsense'"),
        ({"gate_layer": "nonsense"}, "gate_layer must be the name of a timm activation .* got 'nonsense'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GatherExcite(32, **kwargs)

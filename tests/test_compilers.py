"""TorchScript, trace, fx, export and torch.compile: whatever plain timm manages for a model."""

import warnings
from functools import lru_cache

import pytest
import timm
import torch

from family_names import NAMES, create, image, with_attn

WAYS = {
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
}

# One name for each way in which a layer is called: a slot, a gate, NHWC, two children, a gain, an outer container;
# under 'stage' also tokens, a tuple, a list, and a layer held by a child.
CALLS = [
    ("seresnet18", ("auto", "stage")),
    ("mobilenetv3_small_050", ("auto", "stage")),
    ("mambaout_femto", ("auto", "stage")),
    ("convformer_s18", ("auto", "stage")),
    ("cspnext_s", ("auto", "stage")),
    ("vgg11", ("auto", "stage")),
    ("convnext_atto", ("auto", "stage")),
    ("efficientformer_l1", ("stage",)),
    ("efficientvim_m1", ("stage",)),
    ("selecsls42", ("stage",)),
    ("densenet121", ("stage",)),
]


def one_per_family():
    module_of = {name: timm.models.model_entrypoint(name).__module__ for name in NAMES}
    return list({module: name for name, module in reversed(module_of.items())}.values())[::-1]


plain_of = lru_cache(maxsize=1)(create)  # for the tests of a name, in turn


def check(name, where, way):
    """The model works this way, or plain timm's does not either."""
    plain = plain_of(name)
    model = with_attn(plain, attn_where=where)
    x = image(name, batch=1)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(x)
        try:
            output = WAYS[way](model, x)(x)
        except Exception as error:
            with pytest.raises(type(error)):
                WAYS[way](plain, x)(x)
            pytest.skip(f"plain timm does not manage {name}: {type(error).__name__}")
    output, expected = (y if isinstance(y, torch.Tensor) else y[0] for y in (output, expected))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "where", "way"),
    # compiling these four is slow, and among what the test of families does
    [(n, where, way) for n, wheres in CALLS for where in wheres for way in WAYS if len(wheres) > 1 or way != "compile"],
)
def test_each_kind_of_call(name, where, way):
    check(name, where, way)


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["add", "stage"])
@pytest.mark.parametrize("name", one_per_family())
def test_one_name_per_family(name, where, way):
    check(name, where, way)

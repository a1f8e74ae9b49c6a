import copy

import pytest
import timm
import torch
from timm.layers import EcaModule

import timm_eca
from conftest import randomize_
from timm_eca import EcaLayer, timm_hooks
from timm_eca.layers.timm_layers import TIMM_ATTNS

TIMM_ECA_MODELS = sorted(set(timm.list_models(["eca*", "nf_eca*"])) - {f.__name__ for f in timm_hooks.ENTRYPOINTS})
# Their attention layers are at most this deep in the file of a family, so one each runs forward; the rest are built.
FORWARD = {
    "ecaresnet26t": 64,
    "ecaresnet50d": 64,
    "ecaresnet50d_pruned": 64,
    "ecaresnetlight": 64,
    "ecaresnext26t_32x4d": 64,
    "eca_resnext26ts": 64,
    "eca_resnet33ts": 64,
    "eca_vovnet39b": 64,
    "eca_nfnet_l0": 64,
    "nf_ecaresnet26": 64,
    "eca_botnext26ts_256": 256,
    "eca_halonext26ts": 256,
}


class TestAttnByName:
    @pytest.mark.usefixtures("_timm_without_doors")
    def test_timms_names_keep_their_classes(self):
        theirs = {name: timm.layers.get_attn(name) for name in (*TIMM_ATTNS, "sk", "splat", "lambda", "halo")}
        timm_eca.install()
        for name, layer in theirs.items():
            ours = timm.layers.get_attn(name)
            parts = [(getattr(x, "func", x), getattr(x, "keywords", None)) for x in (ours, layer)]
            assert parts[0] == parts[1], name

    @pytest.mark.parametrize("name", ["eca", "ECA", "Eca"])
    def test_eca_in_every_module(self, name):
        import sys

        assert isinstance(timm.layers.create_attn(name, 64), EcaLayer)
        holders = [m for n, m in sys.modules.items() if n.split(".")[0] == "timm" and hasattr(m, "get_attn")]
        assert len(holders) > 7  # timm.layers, create_attn, byobnet, cspnet, nfnet, gcvit, _efficientnet_builder, ...
        for module in holders:
            assert module.get_attn(name) is EcaLayer, module

    def test_kernel_size_is_obeyed(self):
        assert timm.layers.create_attn("eca", 256, kernel_size=9).conv.kernel_size == (9,)

    @pytest.mark.parametrize("value", [None, "", False])
    def test_no_attention(self, value):
        assert timm.layers.create_attn(value, 64) is None

    def test_true_is_se(self):
        assert isinstance(timm.layers.create_attn(True, 64), timm.layers.SEModule)

    def test_classes_pass(self):
        assert timm.layers.get_attn(EcaModule) is EcaModule

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"Unknown attention layer 'cbma'.*Did you mean 'cbam'"):
            timm.layers.create_attn("cbma", 64)


class TestTimmsOwnEcaModels:
    def test_list(self):
        assert len(TIMM_ECA_MODELS) >= 20
        assert set(FORWARD) <= set(TIMM_ECA_MODELS)

    @pytest.mark.usefixtures("_timm_without_doors")
    @pytest.mark.parametrize("name", TIMM_ECA_MODELS)
    def test_same_keys(self, name):
        theirs = timm.create_model(name, device="meta")
        timm_eca.install()
        ours = timm.create_model(name, device="meta")
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
        assert list(shapes[0].items()) == list(shapes[1].items())
        assert sum(isinstance(m, EcaModule) for m in theirs.modules()) > 0
        assert sum(isinstance(m, EcaModule) for m in ours.modules()) == 0
        assert sum(isinstance(m, EcaLayer) for m in ours.modules()) == sum(
            isinstance(m, EcaModule) for m in theirs.modules()
        )

    @pytest.mark.usefixtures("_timm_without_doors")
    @pytest.mark.parametrize("name", FORWARD)
    def test_same_output(self, name):
        torch.manual_seed(0)
        theirs = randomize_(timm.create_model(name)).eval()
        timm_eca.install()
        ours = timm.create_model(name).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(1, 3, FORWARD[name], FORWARD[name])
        with torch.no_grad():
            expected = theirs(x)
            torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


class TestOwnMeaning:
    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "naflexvit_base_patch16_gap"]
    )
    def test_self_attention_is_left_alone(self, name):
        model = timm.create_model(name, attn_layer="diff", device="meta")
        assert any(type(m).__name__ == "DiffAttention" for m in model.modules())
        with pytest.raises(ValueError, match=f"{name} has no place for channel attention"):
            timm.create_model(name, attn_layer="eca", device="meta")

    @pytest.mark.parametrize("name", ["resnet51q", "gernet_s", "nf_resnet26"])
    def test_timm_places_it_itself(self, name):
        model = timm.create_model(name, attn_layer="eca", attn_kwargs={"kernel_size": 9}, device="meta")
        kernels = {m.conv.kernel_size for m in model.modules() if isinstance(m, EcaLayer)}
        assert kernels == {(9,)}
        assert len(model.attn_sites) == sum(isinstance(m, EcaLayer) for m in model.modules())
        with pytest.raises(ValueError, match=f"timm places attn_layer in {name} itself.*attn_stages"):
            timm.create_model(name, attn_layer="eca", attn_stages=(3,), device="meta")
        model = timm.create_model(name, attn_layer="eca", attn_where="end", attn_stages=(3,), device="meta")
        assert {site.stage for site in model.attn_sites} == {3}

    @pytest.mark.parametrize("name", ["resnet51q", "gernet_s", "nf_resnet26"])
    def test_a_built_model_has_no_auto_there(self, name):
        """What is saved as 'auto' would be rebuilt by the constructor, with the layer in another place."""
        model = timm.create_model(name, device="meta")
        for function in (timm_eca.plan_attn, timm_eca.add_attn_):
            with pytest.raises(ValueError, match="attn_where='auto' leaves the place to the constructor of"):
                function(model, "eca")
        added = timm_eca.add_attn_(model, "eca", attn_where="add")
        created = timm.create_model(
            name, device="meta", **{k: v for k, v in added._model_args.items() if k != "device"}
        )
        assert list(created.state_dict()) == list(added.state_dict())

    def test_unfit_arguments_where_timm_places_it(self):
        with pytest.raises(ValueError, match=r"kernel_sise.*It takes kernel_size"):
            timm.create_model("gernet_s", attn_layer="eca", attn_kwargs={"kernel_sise": 3}, device="meta")

    def test_plain_and_complete_checkpoints_where_timm_places_it(self):
        plain = timm.create_model("seresnext26ts")
        weights = {"state_dict": dict(plain.state_dict())}
        model = timm.create_model("seresnext26ts", attn_layer="eca", pretrained=True, pretrained_cfg_overlay=weights)
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items() if "attn" not in k)
        half = {k: v for k, v in model.state_dict().items() if k != "stages.0.0.attn.conv.weight"}
        with pytest.raises(ValueError, match=r"lacks stages.0.0.attn.conv.weight"):
            model.load_state_dict(half, strict=False)

    def test_timm_would_ignore_it(self):
        assert len(timm.create_model("halonet_h1", attn_layer="eca", device="meta").attn_sites) == 19

    @pytest.mark.parametrize("name", ["vitamin_small_224", "vit_small_r26_s32_224"])
    def test_convolutional_stems_of_transformers(self, name):
        assert len(timm.create_model(name, attn_layer="eca", device="meta").attn_sites) > 5


class TestRefusals:
    @pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resmlp_12_224", "levit_128", "pit_ti_224"])
    def test_no_convolutional_block(self, name):
        with pytest.raises(
            ValueError, match=r"Models that take it: resnet50, mobilenetv2_100, convnext_tiny\.$"
        ) as error:
            timm.create_model(name, attn_layer="eca", device="meta")
        assert str(error.value).startswith(f"{name} has no place for channel attention: ")

    def test_arguments_without_layer(self):
        with pytest.raises(ValueError, match="attn_stages given without attn_layer"):
            timm.create_model("resnet18", attn_stages=(3,))

    def test_a_subclass_of_a_transformer(self):
        class Own(timm.models.VisionTransformer):
            pass

        with pytest.raises(ValueError, match="own has no place for channel attention"):
            timm.models.build_model_with_cfg(
                Own, "own", False, pretrained_cfg={"num_classes": 1}, attn_layer="eca", device="meta"
            )

    def test_unknown_layer(self):
        with pytest.raises(ValueError, match=r"Unknown attention layer 'eac'.*Did you mean .*'eca'"):
            timm.create_model("resnet18", attn_layer="eac")

    def test_none_is_no_attention(self):
        model = timm.models.resnet18(attn_layer=None, attn_kwargs=None, device="meta")
        assert not hasattr(model, "attn_spec")


SNAPSHOT = """
import sys, timm, timm.models, torch
from timm.models import _registry
def snapshot():
    held = {(n, k): id(v) for n, m in sys.modules.items() if n.split('.')[0] == 'timm' for k, v in vars(m).items()
            if not k.startswith('__') or k == '__all__'}
    names = ['_module_to_models', '_model_to_module', '_model_entrypoints', '_model_has_pretrained',
             '_model_default_cfgs', '_model_pretrained_cfgs', '_model_with_tags']
    return held, {n: dict(getattr(_registry, n)) if isinstance(getattr(_registry, n), dict)
                  else set(getattr(_registry, n)) for n in names}
import copy
before = copy.deepcopy(snapshot())
"""


class TestInstall:
    def test_uninstall_leaves_timm_as_it_was(self, run_python):
        run_python(
            SNAPSHOT + "import timm_eca\n"
            "assert timm_eca.installed() and timm.is_model('eca_resnet50')\n"
            "changed = snapshot()\n"
            "assert changed[0] != before[0] and changed[1] != before[1]\n"
            "timm_eca.uninstall(); timm_eca.uninstall()\n"
            "assert not timm_eca.installed() and not timm.is_model('eca_resnet50')\n"
            "assert snapshot() == before\n"
            "timm_eca.install(); timm_eca.install()\n"
            "assert timm.create_model('eca_resnet18', device='meta').attn_spec.name == 'eca'\n"
            "assert snapshot()[1].keys() == changed[1].keys() and snapshot()[0] == changed[0]\n"
        )

    @pytest.mark.parametrize(
        "order", ["import timm, timm_eca", "import timm_eca, timm", "import timm_eca, timm_eca, timm"]
    )
    def test_import_order(self, run_python, order):
        run_python(
            "import warnings; warnings.simplefilter('error')\n"
            f"{order}\n"
            "from timm import create_model\n"
            "assert create_model('resnet18', attn_layer='eca', device='meta').attn_spec.name == 'eca'\n"
            "assert len(timm.list_models('eca_resnet18')) == 1\n"
        )

    def test_reload_and_import_anew(self, run_python):
        run_python(
            SNAPSHOT + "import warnings, importlib; warnings.simplefilter('error')\n"
            "import timm_eca\n"
            "importlib.reload(timm_eca)\n"
            "importlib.reload(sys.modules['timm_eca.timm_hooks'])\n"
            "for name in [n for n in sys.modules if n.startswith('timm_eca.layers')]:\n"
            "    importlib.reload(sys.modules[name])\n"
            "for name in [n for n in sys.modules if n.split('.')[0] == 'timm_eca']: del sys.modules[name]\n"
            "import timm_eca\n"
            "assert timm.layers.get_attn('eca') is timm_eca.EcaLayer\n"
            "model = timm.create_model('eca_resnet18', device='meta')\n"
            "assert type(model.layer1[0].se) is timm_eca.EcaLayer\n"
            "timm_eca.uninstall()\n"
            "assert snapshot() == before\n"
        )

    @pytest.mark.parametrize("first", ["import timm_eca\n", ""], ids=["wrapped after", "wrapped before"])
    def test_wrappers_of_callers(self, run_python, first):
        """They are called, the doors are open in all other modules, and `uninstall` gives them back."""
        run_python(
            f"import functools, timm, timm.layers, timm.models\n{first}"
            "called = []\n"
            "def wrapped(f):\n"
            "    return functools.wraps(f)(lambda *a, **k: called.append(f.__name__) or f(*a, **k))\n"
            "timm.models.build_model_with_cfg = build = wrapped(timm.models.build_model_with_cfg)\n"
            "timm.layers.get_attn = get = wrapped(timm.layers.get_attn)\n"
            "import timm_eca\n"
            "called.clear()\n"
            "assert timm_eca.installed()\n"
            "assert timm.create_model('eca_resnet18', device='meta').attn_spec.name == 'eca'\n"
            "assert type(timm.layers.create_attn('se_paper', 64)).__name__ == 'SePaper'\n"
            "assert timm.layers.get_attn('se_paper').__name__ == 'SePaper'\n"
            "arguments = {'attn_layer': 'eca', 'block': timm.models.resnet.BasicBlock, 'layers': (1, 1, 1, 1)}\n"
            "model = timm.models.build_model_with_cfg(timm.models.ResNet, 'resnet18', False, **arguments)\n"
            "assert len(model.attn_sites) == 4 and 'build_model_with_cfg' in called\n"
            "timm_eca.uninstall()\n"
            "assert (timm.models.build_model_with_cfg, timm.layers.get_attn) == (build, get)\n"
            "assert not timm_eca.installed()\n"
        )

    def test_models_without_attention_are_untouched(self):
        model = timm.create_model("resnet18", device="meta")
        assert not hasattr(model, "attn_spec")
        assert not model._load_state_dict_pre_hooks

    def test_import_touches_no_gpu(self, run_python):
        run_python("import timm_eca, torch; assert not torch.cuda.is_initialized()")

    @pytest.mark.usefixtures("_timm_without_doors")
    def test_models_work_without_doors(self):
        model = timm_eca.add_attn_(timm.create_model("resnet18"), "eca")
        twin = copy.deepcopy(model).eval()
        assert twin(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
        with pytest.raises(TypeError, match="attn_layer"):
            timm.create_model("resnet18", attn_layer="eca")

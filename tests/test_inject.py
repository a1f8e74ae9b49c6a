import copy
import pickle

import pytest
import timm
import torch
from timm.layers import EcaModule, SEModule
from torch import nn

import timm_eca
from conftest import randomize_
from timm_eca import EcaLayer, add_attn_, attn_modules, plan_attn
from timm_eca.layers.timm_layers import TIMM_ATTNS

RESNET_NAMES = [n for n in timm.list_models(module="resnet") if not n.endswith("_pruned")]
BACKBONES = ["resnet18", "resnet26", "resnext50_32x4d", "wide_resnet50_2", "resnet26d", "seresnet18", "mobilenetv2_050"]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestPlacement:
    @pytest.mark.parametrize("name", RESNET_NAMES)
    def test_every_resnet(self, name):
        """In each block, after the last norm: the slot `se`, as wide as the block's output."""
        model = timm.create_model(name, attn_layer="eca", device="meta")
        layers = [model.layer1, model.layer2, model.layer3, model.layer4]
        blocks = [block for stage in layers for block in stage]
        assert all(type(block.se) is EcaLayer for block in blocks)
        assert [s.path for s in model.attn_sites] == [
            f"layer{i}.{j}.se" for i, stage in enumerate(layers, 1) for j in range(len(stage))
        ]
        assert [s.channels for s in model.attn_sites] == [
            (block.bn3 if hasattr(block, "bn3") else block.bn2).weight.numel() for block in blocks
        ]

    @pytest.mark.parametrize("name", timm.list_models("mobilenetv2_*"))
    def test_every_mobilenetv2(self, name):
        model = timm.create_model(name, attn_layer="eca", device="meta")
        blocks = [block for stage in model.blocks for block in stage]
        assert len(attn_modules(model)) == len(blocks) >= 17
        for site, block in zip(model.attn_sites, blocks):
            norm = block.bn3 if hasattr(block, "bn3") else block.bn2
            assert type(block.attn_last) is EcaLayer
            assert site.channels == norm.num_features

    def test_between_last_norm_and_addition(self, images):
        """Seen from the running model: each layer takes the last norm's output, and gives what is added."""
        model = timm.create_model("resnet26", attn_layer="eca").eval()
        seen = {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0].clone(), o.clone())}))
        model(images)
        for i in range(1, 5):
            for j in range(2):
                block = f"layer{i}.{j}"
                assert torch.equal(seen[f"{block}.se"][0], seen[f"{block}.bn3"][1])
                skip = seen[f"{block}.downsample"][1] if j == 0 else seen[f"{block}.conv1"][0]
                assert torch.equal(seen[f"{block}.act3"][1], (seen[f"{block}.se"][1] + skip).relu())

    def test_mobilenetv2_also_without_skip(self, images):
        model = timm.create_model("mobilenetv2_050", attn_layer="eca").eval()
        block, outputs = model.blocks[1][0], {}
        assert not block.has_skip
        block.register_forward_hook(lambda m, i, o: outputs.update(block=o))
        block.attn_last.register_forward_hook(lambda m, i, o: outputs.update(attn=o))
        model(images)
        assert torch.equal(outputs["block"], outputs["attn"])

    def test_registered_where_timm_registers_it(self):
        ours = timm.create_model("resnet26", attn_layer="eca", device="meta")
        theirs = timm.create_model("resnet26", block_args={"attn_layer": EcaModule}, device="meta")
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]

    def test_squeeze_and_excitation_gives_way(self):
        model = timm.create_model("seresnet18", attn_layer="eca", device="meta")
        assert {s.replaces for s in model.attn_sites} == {"SEModule"}
        assert not any(isinstance(m, SEModule) for m in model.modules())

    @pytest.mark.parametrize(
        ("name", "where", "expected"),
        [
            ("resnet18", "auto", "layer1.0.se"),
            ("resnet18", "end", "layer1.0.se"),
            ("resnet18", "add", "layer1.0.se"),
            ("resnet18", "stage", "layer1.attn_stage"),
            ("seresnet18", "auto", "layer1.0.se"),
            ("seresnet18", "end", "layer1.0.se"),
            ("seresnet18", "add", "layer1.0.attn_last"),
            ("efficientnet_b0", "auto", "blocks.0.0.se"),
            ("efficientnet_b0", "end", "blocks.0.0.attn_last"),
            ("efficientnet_b0", "add", "blocks.0.0.attn_last"),
        ],
    )
    def test_where(self, name, where, expected, images):
        plain = timm.create_model(name)
        model = timm.create_model(name, attn_layer="eca", attn_where=where)
        assert model.attn_sites[0].path == expected
        kept = [n for n, m in model.named_modules() if type(m).__name__ in ("SEModule", "SqueezeExcite")]
        had = [n for n, m in plain.named_modules() if type(m).__name__ in ("SEModule", "SqueezeExcite")]
        assert kept == (had if where in ("add", "stage") else [])
        assert model(images).shape == (2, 1000)

    @pytest.mark.parametrize("replaced", ["eca", "ecam", "ela", "strip", "se"])
    def test_as_wide_as_what_it_replaces_takes(self, replaced, images):
        """Also where the first convolution of that is not one over all channels."""
        model = timm.create_model("efficientnet_b0", se_layer=replaced, attn_layer="se_paper").eval()
        assert [site.channels for site in model.attn_sites][:3] == [32, 96, 144]
        assert model(images).shape == (2, 1000)

    @pytest.mark.parametrize(("stages", "expected"), [((3, 4), {3, 4}), ([4, 4], {4}), (2, {2}), (None, {1, 2, 3, 4})])
    def test_stages(self, stages, expected):
        model = timm.create_model("seresnet18", attn_layer="eca", attn_stages=stages, device="meta")
        assert {s.stage for s in model.attn_sites} == expected
        assert model.attn_spec.attn_stages is None or model.attn_spec.attn_stages == tuple(sorted(expected))
        for number in range(1, 5):
            kind = EcaLayer if number in expected else SEModule
            assert all(isinstance(b.se, kind) for b in getattr(model, f"layer{number}"))

    def test_arguments_reach_the_layer(self):
        model = timm.create_model("resnet18", attn_layer="eca", attn_kwargs={"kernel_size": 9}, device="meta")
        assert {m.conv.kernel_size for m in attn_modules(model).values()} == {(9,)}
        per_stage = [{"kernel_size": k} for k in (1, 3, 5, 7)]
        model = timm.create_model("resnet18", attn_layer="eca", attn_kwargs=per_stage, device="meta")
        assert [m.conv.kernel_size[0] for m in attn_modules(model).values()] == [1, 1, 3, 3, 5, 5, 7, 7]

    def test_classes_and_functions(self):
        for layer in (EcaModule, lambda channels: nn.Identity(), timm_eca.get_attn("gca")):
            model = timm.create_model("resnet18", attn_layer=layer, device="meta")
            assert len(attn_modules(model)) == 8

    @pytest.mark.parametrize("name", TIMM_ATTNS)
    def test_timms_layers(self, name):
        kwargs = {"bat": {"block_size": 1}}.get(name)  # it needs maps of whole blocks
        model = timm.create_model("resnet18", attn_layer=name, attn_kwargs=kwargs)
        assert model(torch.randn(2, 3, 128, 128)).shape == (2, 1000)


class TestPlanAndAdd:
    @pytest.mark.parametrize("function", [plan_attn, add_attn_])
    def test_a_name_is_no_model(self, function):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got 'resnet18'.*timm.create_model"):
            function("resnet18")

    @pytest.mark.parametrize("name", BACKBONES)
    def test_plan_touches_nothing(self, name):
        model = timm.create_model(name)
        before, modules, random = state(model), list(model.named_modules()), torch.get_rng_state()
        sites = plan_attn(model, "eca", attn_where="add", attn_init="identity")
        assert same_state(before, state(model))
        assert list(model.named_modules()) == modules
        assert torch.equal(torch.get_rng_state(), random)
        assert not hasattr(model, "attn_spec")
        add_attn_(model, "eca", attn_where="add", attn_init="identity")
        assert list(model.attn_sites) == sites

    @pytest.mark.parametrize("name", BACKBONES)
    def test_add_is_create(self, name, images):
        torch.manual_seed(0)
        created = timm.create_model(name, attn_layer="eca", attn_stages=(2, 3)).eval()
        torch.manual_seed(0)
        added = add_attn_(timm.create_model(name), "eca", attn_stages=(2, 3)).eval()
        assert same_state(state(created), state(added))
        assert torch.equal(created(images), added(images))

    def test_keeps_mode(self):
        model = add_attn_(timm.create_model("resnet18").eval())
        assert not any(m.training for m in model.modules())

    def test_spec_on_model(self):
        model = timm.create_model("resnet18", attn_layer="eca", attn_stages=[4], device="meta")
        assert model.attn_spec == timm_eca.AttnSpec("eca", attn_stages=(4,))
        features = timm.create_model("resnet18", attn_layer="eca", features_only=True, device="meta")
        assert features.attn_spec.name == "eca"
        assert len(attn_modules(features)) == 8

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"attn_layer": "eac"}, "Did you mean .*'eca'"),
            ({"attn_layer": 3}, "must be a name, class, partial or function, got 3"),
            ({"attn_kwargs": {"kernel_size": 4}}, "kernel_size must be an odd positive integer"),
            ({"attn_kwargs": {"kernel_sise": 3}}, "kernel_sise.*It takes kernel_size, gamma, beta"),
            ({"attn_kwargs": 3}, "attn_kwargs must be a mapping"),
            ({"attn_kwargs": [{}, {}]}, "attn_kwargs must be one mapping, or 4, one per stage, got 2"),
            ({"attn_stages": (0, 1)}, r"attn_stages must be among 1, 2, 3, 4, got \(0, 1\)"),
            ({"attn_stages": 5}, r"attn_stages must be among 1, 2, 3, 4, got \(5,\)"),
            ({"attn_stages": ()}, "attn_stages must be stage numbers such as"),
            ({"attn_stages": "3"}, "attn_stages must be stage numbers such as"),
            ({"attn_where": "middle"}, "attn_where must be one of 'auto', 'end', 'add', 'stage', got 'middle'"),
            ({"attn_init": "zero"}, "attn_init must be one of 'default', 'identity', got 'zero'"),
            ({"attn_layer": "cbam", "attn_init": "identity"}, "needs a layer with a method identity_init_"),
            ({"attn_kwargs": {"gate_layer": "tanh"}, "attn_init": "identity"}, "power of two"),
            ({"attn_layer": lambda channels: None}, "must make a torch.nn.Module, it made None"),
        ],
    )
    def test_refusals_leave_the_model_alone(self, arguments, message):
        model = timm.create_model("resnet18")
        before, modules = state(model), list(model.named_modules())
        with pytest.raises(ValueError, match=message):
            add_attn_(model, **arguments)
        with pytest.raises(ValueError, match=message):
            timm.create_model("resnet18", **{"attn_layer": "eca", **arguments})
        assert same_state(before, state(model))
        assert list(model.named_modules()) == modules

    def test_not_twice(self):
        model = timm.create_model("resnet18", attn_layer="eca", device="meta")
        with pytest.raises(ValueError, match="already carries attention"):
            add_attn_(model, "se")

    def test_nothing_matched(self):
        with pytest.raises(ValueError, match="this model has no place for channel attention: Sequential"):
            plan_attn(nn.Sequential(nn.Conv2d(3, 8, 3)))


class TestAsAModel:
    @pytest.mark.parametrize("name", BACKBONES)
    def test_pickle_deepcopy_and_state_dict(self, name, images):
        model = randomize_(timm.create_model(name, attn_layer="eca")).eval()
        expected = model(images)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), expected)
            assert twin.attn_spec == model.attn_spec
            twin.load_state_dict(model.state_dict())

    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
    def test_transforms(self, name, images):
        model = randomize_(timm.create_model(name, attn_layer="eca")).eval()
        expected = model(images)
        with torch.no_grad():
            others = {
                "script": torch.jit.script(model),
                "trace": torch.jit.trace(model, images),
                "export": torch.export.export(model, (images,)).module(),
                "channels_last": copy.deepcopy(model).to(memory_format=torch.channels_last),
            }
        for label, other in others.items():
            torch.testing.assert_close(
                other(images), expected, rtol=1e-4, atol=1e-4, msg=lambda m, k=label: f"{k}: {m}"
            )

    def test_compiles_without_a_break(self, images):
        model = timm.create_model("resnet18", attn_layer="eca").eval()
        compiled = torch.compile(model, fullgraph=True)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", BACKBONES)
    @pytest.mark.parametrize(
        ("arguments", "x_dtype"),
        [({"num_classes": 7}, None), ({"in_chans": 1}, None), ({"dtype": torch.bfloat16}, torch.bfloat16)],
    )
    def test_creation_arguments(self, name, arguments, x_dtype):
        model = timm.create_model(name, attn_layer="eca", **arguments)
        x = torch.randn(2, arguments.get("in_chans", 3), 64, 64, dtype=x_dtype)
        assert model(x).shape == (2, arguments.get("num_classes", 1000))
        assert {p.dtype for p in model.parameters()} == {x_dtype or torch.float32}

    @pytest.mark.parametrize("name", BACKBONES)
    def test_features_only(self, name, images):
        torch.manual_seed(0)
        whole = timm.create_model(name, attn_layer="eca").eval()
        features = timm.create_model(name, attn_layer="eca", features_only=True).eval()
        features.load_state_dict(whole.state_dict(), strict=False)
        assert len(attn_modules(features)) == len(attn_modules(whole))
        for ours, theirs in zip(features(images), whole.forward_intermediates(images, intermediates_only=True)):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("name", BACKBONES)
    def test_meta(self, name):
        identity = {"attn_layer": "eca", "attn_where": "add", "attn_init": "identity"}
        assert all(p.is_meta for p in timm.create_model(name, device="meta", **identity).parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in timm.create_model(name, **identity).parameters())

    def test_gradient_in_every_weight(self, images):
        model = timm.create_model("resnet18", attn_layer="eca", zero_init_last=False)
        model(images).square().mean().backward()
        assert all((m.conv.weight.grad != 0).all() for m in attn_modules(model).values())

"""Folders in Hub format without a Hub: what is written, and who can load it."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import timm_eca
from conftest import randomize_
from timm_eca import add_attn_, attn_modules, hub
from timm_eca.errors import IntegrityError
from timm_eca.weights import sha256_of

NET = "eca_mobilenetv2_050"
FILES = ["README.md", "config.json", "model.safetensors"]


def made(name, **kwargs):
    torch.manual_seed(0)
    return randomize_(timm.create_model(name, **kwargs)).eval()


def in_place():
    return randomize_(add_attn_(timm.create_model("resnet18", num_classes=5), "eca")).eval()


PORTABLE = {
    "by name": lambda: made("resnet18", attn_layer="eca", num_classes=3, in_chans=1),
    "in place": in_place,
    "entrypoint": lambda: made("eca_resnet18", kernel_sizes="adaptive", num_classes=2),
    "bottlenecks": lambda: made("resnet26d", attn_layer="eca", num_classes=2),
    "no attention": lambda: made("test_resnet"),
}
NOT_PORTABLE = {
    "preset": lambda: made("eca_resnet18"),
    "one kernel size": lambda: made("resnet18", attn_layer="eca", attn_kwargs={"kernel_size": 3}),
    "some stages": lambda: made("resnet18", attn_layer="eca", attn_stages=(3, 4)),
    "hard gate": lambda: made("resnet18", attn_layer="eca", attn_kwargs={"gate_layer": "hard_sigmoid"}),
    "another layer": lambda: made("resnet18", attn_layer="se_var1"),
    "another network": lambda: made(NET),
}
PLAIN_TIMM = """
import sys
sys.modules["timm_eca"] = None  # an import of it fails
from pathlib import Path
import timm, torch
for folder in Path("saved").iterdir():
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.save(model(torch.load(folder / "x.pt")), folder / "y.pt")
assert not [name for name in sys.modules if name.startswith("timm_eca.")]
"""


class TestPortable:
    def test_plain_timm_loads_it(self, tmp_path, run_python):
        models = {tmp_path / "saved" / kind: make() for kind, make in PORTABLE.items()}
        for folder, model in models.items():
            hub.save(model, folder, portable=True)
            torch.save(torch.randn(2, next(model.parameters()).shape[1], 64, 64), folder / "x.pt")
        run_python(PLAIN_TIMM)
        for folder, model in models.items():
            x, again = torch.load(folder / "x.pt"), hub.load(folder).eval()
            with torch.no_grad():
                torch.testing.assert_close(torch.load(folder / "y.pt"), model(x))
                assert torch.equal(again(x), model(x))
            assert len(attn_modules(again)) == len(attn_modules(model))

    @pytest.mark.parametrize("kind", NOT_PORTABLE)
    def test_others_need_this_package(self, kind, tmp_path):
        model = NOT_PORTABLE[kind]()
        with pytest.raises(ValueError, match=r"portable=True needs a ResNet of timm with 'eca' of adaptive kernel"):
            hub.save(model, tmp_path / "m", portable=True)
        assert not list(tmp_path.iterdir())
        folder = hub.save(model, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        assert (config["portable"], config["attn"]) == (False, json.loads(json.dumps(model.attn_spec.as_args())))
        again = hub.load(folder).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(again(x), model(x))

    def test_it_is_the_default_where_it_can_be(self, tmp_path):
        model = PORTABLE["entrypoint"]()
        config = hub.describe(model)
        assert (config["portable"], config["architecture"]) == (True, "resnet18")
        assert config["model_args"]["block_args"] == {"attn_layer": "eca"}
        assert hub.describe(model, portable=False)["architecture"] == "eca_resnet18"

    def test_built_with_fused(self):
        """An argument of this package is none of plain timm's."""
        config = hub.describe(made("resnet18", attn_layer="eca", fused=False), portable=True)
        assert config["model_args"].keys() == {"num_classes", "in_chans", "global_pool", "block_args"}

    @pytest.mark.parametrize("lost", ["model_args", "block_args", "attn"])
    def test_what_it_cannot_do_without(self, lost, tmp_path):
        folder = hub.save(PORTABLE["entrypoint"](), tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        (config["model_args"] if lost == "block_args" else config).pop(lost)
        (folder / "config.json").write_text(json.dumps(config))
        for check in (hub.load, hub.verify):
            with pytest.raises(IntegrityError, match=r"says that it is portable, and needs model_args with block_args"):
                check(folder)

    @pytest.mark.parametrize("more", [{"checkpoint_path": "w.pth"}, {"pretrained_cfg_overlay": {"url": "file:w.pth"}}])
    def test_nothing_but_attention(self, more, tmp_path):
        """What else stood there would reach timm, which could load other weights than those that were checked."""
        folder = hub.save(PORTABLE["entrypoint"](), tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config["attn"].update(more)
        (folder / "config.json").write_text(json.dumps(config))
        for check in (hub.load, hub.verify):
            with pytest.raises(IntegrityError, match=r"attn with nothing but attn_layer, attn_kwargs, attn_stages"):
                check(folder)

    def test_attention_that_there_is_not(self, tmp_path):
        folder = hub.save(PORTABLE["entrypoint"](), tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config["attn"]["attn_layer"] = "ecs"
        (folder / "config.json").write_text(json.dumps(config))
        for check in (hub.load, hub.verify):
            with pytest.raises(IntegrityError, match="can be made as its config says: Unknown attention layer 'ecs'"):
                check(folder)


def other_head():
    model = made("resnet18", attn_layer="eca")
    model.fc = torch.nn.Linear(512, 10)
    return model


def partly_compiled():
    model = made("eca_resnet18")
    model.layer1 = torch.compile(model.layer1)
    return model


class TestSave:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (other_head, r"fc\.bias is \(10,\), not \(1000,\).* reset_classifier"),
            (partly_compiled, r"layer1\.0\.bn1\.bias is absent.* before parts"),
        ],
    )
    def test_a_model_that_its_config_does_not_make(self, changed, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            hub.save(changed(), tmp_path / "m")
        assert not list(tmp_path.iterdir())

    def test_released_name(self, net, tmp_path):
        with pytest.raises(ValueError, match=r"released must be one of eca_resnet18, .* got 'eca_resnet18\.e'"):
            hub.save(net, tmp_path / "m", released="eca_resnet18.e")

    def test_what_is_written(self, net, folder):
        assert sorted(path.name for path in folder.iterdir()) == FILES
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        weights = {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size}
        assert (config["weights"], config["kernel_sizes"]) == (weights, [1, 1, 1, 1, 3, 3, 3])
        assert load_file(path).keys() == net.state_dict().keys()
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
        assert "Accuracy" not in card.text  # nothing is claimed of weights that nobody measured

    def test_wrapped_models(self, net, tmp_path):
        out = hub.save(torch.nn.DataParallel(torch.compile(net)), tmp_path / "m")
        assert load_file(out / "model.safetensors").keys() == net.state_dict().keys()

    def test_old_folder(self, tmp_path):
        net = made(NET)
        for seed in (1, 2):
            randomize_(net, seed)
            hub.save(net, tmp_path / "m")
        assert torch.equal(hub.load(tmp_path / "m").bn1.weight, net.bn1.weight)
        (tmp_path / "m" / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"m holds other files than those of timm_eca\.hub\.save"):
            hub.save(net, tmp_path / "m")
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize("name", ["README.md", "config.json"])
    def test_folder_of_others(self, name, tmp_path):
        (tmp_path / name).write_text('{"app": "mine"}')
        with pytest.raises(ValueError, match="holds other files than those"):
            hub.save(made(NET), tmp_path)
        assert (tmp_path / name).read_text() == '{"app": "mine"}'

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_all_files_have_one_mode(self, mask, mode, tmp_path, umask):
        umask(mask)
        folder = hub.save(timm.create_model("test_resnet"), tmp_path / "m")
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(FILES, mode)

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert hub.save(made(NET), "~/m") == tmp_path / "m"
        assert sorted(path.name for path in (tmp_path / "m").iterdir()) == FILES

    def test_no_classifier(self, tmp_path):
        with pytest.raises(ValueError, match="Only a timm classifier can be saved in Hub format, got Linear"):
            hub.save(torch.nn.Linear(2, 2), tmp_path / "m")


def test_uninstalled(folder, tmp_path):
    portable = hub.save(PORTABLE["entrypoint"](), tmp_path / "portable")
    plain = hub.save(PORTABLE["no attention"](), tmp_path / "plain")
    timm_eca.uninstall()
    try:
        for source in (folder, portable):
            with pytest.raises(ValueError, match=r"timm_eca is uninstalled: call timm_eca\.install\(\) first"):
                hub.load(source)
        hub.load(plain)
    finally:
        timm_eca.install()


def test_by_attribute(run_python):
    run_python(
        "import sys, timm_eca\n"
        "assert 'timm_eca.hub' not in sys.modules\n"
        "assert timm_eca.hub.load and timm_eca.convert.convert\n"
        "assert not hasattr(timm_eca, 'conv')"
    )

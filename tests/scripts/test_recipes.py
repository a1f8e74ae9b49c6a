"""Each recipe's optimizer, schedule and augmentation, by timm's factories, and as timm's own train.py makes them.

`train_arguments.json` holds the arguments of timm 1.0.28's train.py with their defaults.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torchvision.transforms import InterpolationMode

from real_checkout import REAL, needs_timms_scripts
from timm_eca import attn_modules
from timm_eca.scripts import borrowed

RECIPES = Path(__file__).parents[2] / "benchmarks" / "recipes"
ARGUMENTS = json.loads((Path(__file__).parent / "train_arguments.json").read_text())
NAMES = ["finetune_identity", "modern_a2", "paper_mobilenetv2", "paper_resnet"]


def recipe(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


class Made:
    """What train.py makes of a recipe: model, optimizer, schedule, transforms."""

    def __init__(self, model, optimizer, scheduler, epochs, train, val):
        self.model, self.optimizer, self.scheduler, self.epochs = model, optimizer, scheduler, epochs
        self.train, self.val = train.transforms, val.transforms

    def rates(self, *epochs):
        """The learning rate in each epoch, stepped as train.py does: once after every epoch."""
        rates = []
        for epoch in range(self.epochs):
            if epoch > 0:
                self.scheduler.step(epoch)
            (rate,) = {group["lr"] for group in self.optimizer.param_groups}
            rates.append(rate)
        return [rates[epoch] for epoch in epochs]


def by_factories(name, _tmp_path, _monkeypatch):
    args = argparse.Namespace(**{**ARGUMENTS, **recipe(name)})
    model = timm.create_model(args.model, drop_rate=args.drop, drop_path_rate=args.drop_path, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    data = resolve_data_config(vars(args), model=model)
    augmented = {k: vars(args)[k] for k in ("scale", "ratio", "hflip", "color_jitter")}
    augmented |= {"auto_augment": args.aa, "re_prob": args.reprob, "interpolation": args.train_interpolation}
    train = create_transform(data["input_size"], is_training=True, **augmented)
    val = create_transform(data["input_size"], interpolation=data["interpolation"], crop_pct=data["crop_pct"])
    return Made(model, optimizer, scheduler, epochs, train, val)


def fresh_train_py(monkeypatch):
    """timm's train.py, imported; its parser keeps a config's values as defaults, so one import serves one test."""
    monkeypatch.setenv(borrowed.FOLDER, str(REAL))
    monkeypatch.delitem(sys.modules, f"{borrowed.__name__}.train", raising=False)
    train = importlib.import_module(f"{borrowed.__name__}.train")
    monkeypatch.delitem(sys.modules, train.__name__)
    monkeypatch.setattr(train.utils, "setup_default_logging", lambda: None)
    return train


def by_train_py(name, tmp_path, monkeypatch):
    """Run timm's train.py with `--config` up to its first epoch."""
    train = fresh_train_py(monkeypatch)
    for split in ("train", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "plain.pth")
    here = {
        "finetune_identity": ["--pretrained-path", str(tmp_path / "plain.pth")],
        "modern_a2": ["--aug-repeats", "0"],  # timm takes them with more than one process only
    }
    folders = ["--data-dir", str(tmp_path), "--output", str(tmp_path)]
    config = ["--config", str(RECIPES / f"{name}.yaml"), "--device", "cpu", "--workers", "0", "--batch-size", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *config, *folders, *here.get(name, [])])
    made = {}

    def note(function):
        def noting(*args, **kwargs):
            result = function(*args, **kwargs)
            made.setdefault(function.__name__, []).append(result)
            return result

        return noting

    for function in ("create_model", "create_optimizer_v2", "create_scheduler_v2", "create_loader"):
        monkeypatch.setattr(train, function, note(getattr(train, function)))
    monkeypatch.setattr(train, "train_one_epoch", Stop.here)
    with pytest.raises(Stop):
        train.main()
    transforms = [loader.dataset.transform for loader in made["create_loader"]]
    return Made(made["create_model"][0], made["create_optimizer_v2"][0], *made["create_scheduler_v2"][0], *transforms)


class Stop(Exception):  # noqa: N818
    @classmethod
    def here(cls, *_, **__):
        raise cls


WAYS = [by_factories, pytest.param(by_train_py, marks=needs_timms_scripts)]


def kinds(transforms):
    return [type(t).__name__ for t in transforms]


def check_the_papers(made, momentum, weight_decay):
    assert type(made.optimizer) is torch.optim.SGD
    decayed = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in decayed} == {id(p) for p in made.model.parameters()}
    for group in made.optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (momentum, weight_decay)
        assert not group["nesterov"]
        assert group["dampening"] == 0
    crop, flip, *rest = made.train
    assert (list(crop.scale), list(crop.ratio)) == ([0.08, 1.0], [3 / 4, pytest.approx(4 / 3)])
    assert crop.interpolation == InterpolationMode.BILINEAR
    assert crop.size == (224, 224)
    assert (type(flip).__name__, flip.p) == ("RandomHorizontalFlip", 0.5)
    assert set(kinds(rest)) <= {"MaybeToTensor", "MaybePILToTensor", "PILToTensor", "ToTensor", "Normalize"}
    resize, centre = made.val[:2]
    assert (kinds([resize]), resize.size, resize.interpolation) == (["Resize"], 256, InterpolationMode.BILINEAR)
    assert (kinds([centre]), tuple(centre.size)) == (["CenterCrop"], (224, 224))


@pytest.mark.parametrize("way", WAYS)
class TestRecipes:
    def test_paper_resnet(self, way, tmp_path, monkeypatch):
        made = way("paper_resnet", tmp_path, monkeypatch)
        check_the_papers(made, 0.9, 1e-4)
        assert made.epochs == 100
        rates = made.rates(0, 29, 30, 59, 60, 89, 90, 99)
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
        norms = [m for m in made.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all((m.weight == 1).all() for m in norms)
        assert sum(p.numel() for p in made.model.parameters()) == 25_557_112

    def test_paper_mobilenetv2(self, way, tmp_path, monkeypatch):
        made = way("paper_mobilenetv2", tmp_path, monkeypatch)
        check_the_papers(made, 0.9, 4e-5)
        assert made.epochs == 400
        epochs = (0, 1, 29, 30, 60, 90, 399)
        assert made.rates(*epochs) == pytest.approx([0.045 * 0.98**epoch for epoch in epochs])
        assert made.model.drop_rate == 0.25
        assert len(attn_modules(made.model)) == 17

    def test_modern(self, way, tmp_path, monkeypatch):
        made = way("modern_a2", tmp_path, monkeypatch)
        assert "lamb" in type(made.optimizer).__name__.lower()
        assert made.epochs == 300
        first, peak, last = made.rates(0, 5, 299)
        assert first == pytest.approx(1e-4)
        assert peak == pytest.approx(5e-3, rel=1e-2)
        assert last == pytest.approx(1e-6, rel=0.2)
        decays = {p.ndim <= 1: g["weight_decay"] for g in made.optimizer.param_groups for p in g["params"]}
        assert decays == {True: 0.0, False: 0.02}
        assert "RandAugment" in kinds(made.train)

    def test_finetune(self, way, tmp_path, monkeypatch):
        settings = recipe("finetune_identity")
        if way is by_factories:
            monkeypatch.setattr(sys.modules[__name__], "recipe", lambda _: {**settings, "pretrained": False})
        made = way("finetune_identity", tmp_path, monkeypatch)
        assert made.model.attn_spec.attn_init == "identity"
        layers = attn_modules(made.model)
        assert len(layers) == 16
        assert all((layer.conv.weight == 0).all() for layer in layers.values())
        assert type(made.optimizer) is torch.optim.AdamW
        assert made.epochs == 30
        assert max(made.rates(*range(30))) == pytest.approx(2e-4, rel=0.05)
        if way is by_train_py:
            plain = timm.create_model("resnet50")
            plain.load_state_dict(torch.load(tmp_path / "plain.pth"))
            images = torch.randn(1, 3, 64, 64)
            assert torch.equal(made.model.eval().forward_features(images), plain.eval().forward_features(images))


def test_every_recipe_is_tested():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_names_are_train_pys(name):
    """train.py takes an unknown name in a config without a word."""
    settings = recipe(name)
    assert not set(settings) - set(ARGUMENTS)
    assert timm.is_model(settings["model"])
    for key, value in settings.items():
        assert not isinstance(value, str) or isinstance(ARGUMENTS[key], str | None), f"{key}: {value!r} is a string"


def test_the_guides_options_are_train_pys(repository):
    guide = (repository / "docs" / "training.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^.*(?:timm-eca|timm_eca\.scripts) train (.*)$", guide, re.MULTILINE)
    options = {option for line in lines for option in re.findall(r"--[a-z-]+", line)}
    assert len(lines) > 6
    assert {option[2:].replace("-", "_") for option in options} <= {*ARGUMENTS, "config", "help"}


@needs_timms_scripts
def test_arguments_are_train_pys(monkeypatch):
    train = fresh_train_py(monkeypatch)
    real = {action.dest: action.default for action in train.parser._actions if action.dest != "help"}
    assert json.loads(json.dumps(real)) == ARGUMENTS

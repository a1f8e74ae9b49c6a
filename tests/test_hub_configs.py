"""The committed folders say what the registry and the paper's data say, and the Hub can read them."""

import runpy

import pytest
import timm
import yaml
from golden import GOLDEN
from huggingface_hub import ModelCard

from timm_eca.models.released import RELEASED
from timm_eca.paper import paper_tables
from timm_eca.weights import read_config

PUBLISHED = [f"{name}.ecanet_in1k" for name in RELEASED]
SOURCES = ("hf_hub_id", "url", "file", "source", "architecture")


def test_nothing_drifted(repository, tmp_path):
    write_all = runpy.run_path(str(repository / "hub_configs" / "generate.py"))["write_all"]
    write_all(tmp_path)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    root = repository / "hub_configs"
    committed = {p.relative_to(root): p.read_text() for p in root.glob("*/*") if p.parent.name != "__pycache__"}
    assert committed == fresh, "run make hub-configs"
    assert {str(path.parent) for path in fresh} == set(PUBLISHED)


def test_the_released_models_are_the_official_ones():
    assert list(RELEASED) == list(GOLDEN)


def test_figures_are_those_of_paper_and_readme():
    figures = RELEASED["eca_resnet50"]
    assert (figures.top1, figures.top5, figures.multiply_adds) == (77.42, 93.62, "3.86G")
    assert (figures.paper_top1, figures.paper_top5, figures.paper_table) == (77.48, 93.68, "Table 3")
    assert RELEASED["eca_resnet18"].paper_table == "supplement, Table A"
    assert RELEASED["eca_mobilenetv2_100"].multiply_adds == "319.9M"


@pytest.mark.parametrize("family", ["resnet", "mobilenetv2"])
def test_recipes_to_train_with_are_the_papers(family, repository):
    settings = yaml.safe_load((repository / "benchmarks" / "recipes" / f"paper_{family}.yaml").read_text())
    quoted = {k: float(v) for k, v in paper_tables()["recipes"][family].items() if k not in ("source", "optimizer")}
    quoted["drop"] = quoted.pop("dropout", 0.0)
    assert {key: float(settings.get(key, 0)) for key in quoted} == quoted


@pytest.mark.parametrize("name", PUBLISHED)
class TestEach:
    def test_config_is_the_registered_cfg(self, name, repository):
        config = read_config(repository / "hub_configs" / name)
        registered = timm.get_pretrained_cfg(name).to_dict()
        written = config["pretrained_cfg"]
        for key, value in registered.items():
            if key not in SOURCES:
                assert written[key] == (list(value) if isinstance(value, tuple) else value), key
        assert config["architecture"] == name.partition(".")[0]

    def test_timm_builds_it(self, name, repository):
        model = timm.create_model(f"local-dir:{repository / 'hub_configs' / name}", device="meta")
        expected = {ours: shape for _, ours, shape in GOLDEN[name.partition(".")[0]]}
        assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == expected

    def test_card(self, name, repository):
        path = repository / "hub_configs" / name / "README.md"
        card = ModelCard.load(path)
        facts = RELEASED[name.partition(".")[0]]
        assert (card.data.library_name, card.data.license) == ("timm", "mit")
        assert card.data.pipeline_tag == "image-classification"
        assert card.data.datasets == ["ILSVRC/imagenet-1k"]
        results = {r.metric_name: r.metric_value for r in card.data.eval_results}
        assert results == {"Top-1 (%)": facts.top1, "Top-5 (%)": facts.top5}
        assert all(r.source_url == "https://github.com/BangguWu/ECANet" for r in card.data.eval_results)
        front = yaml.safe_load(path.read_text().split("---")[1])
        assert front["model-index"][0]["name"] == name
        for heading in ("Model details", "Recipe", "Accuracy", "Usage", "Citation"):
            assert f"## {heading}\n" in card.text

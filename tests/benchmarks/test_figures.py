import json
import runpy

import pytest
from PIL import Image


@pytest.fixture
def figures(repository):
    return runpy.run_path(str(repository / "benchmarks" / "figures.py"))


def test_figure_1_data(figures):
    bubbles = {(b["backbone"], b["method"]): b for b in figures["figure_1_data"]()}
    assert len(bubbles) == 12
    eca, plain = bubbles["resnet50", "ECA-Net"], bubbles["resnet50", "ResNet"]
    assert (eca["top1"], plain["top1"]) == (77.48, 75.20)
    assert (eca["parameters"], plain["parameters"]) == (25_557_112, 25_557_032)
    assert eca["multiply_adds"] - plain["multiply_adds"] == 86_272
    assert bubbles["resnet152", "SENet"]["parameters"] == 60_192_808 + 6_578_176


def test_figure_1_is_drawn(figures, tmp_path):
    figures["plot_figure_1"](figures["figure_1_data"](), tmp_path / "figure1.png")
    with Image.open(tmp_path / "figure1.png") as image:
        assert image.size == (1050, 750)


def test_recorded_figure(figures, repository):
    recorded = json.loads((repository / "benchmarks/results/figure1.json").read_text())
    assert recorded == {"caption": figures["CAPTION"], "bubbles": figures["figure_1_data"]()}

"""Which of the paper's numbers this project meets."""

import pytest

from timm_eca.complexity.compare import FLOPS_TOLERANCE, TABLES, Comparison, compare
from timm_eca.paper import UNITS, decimals, paper_tables

# Rows whose printed number no reading met; the report says what each reading gives.
OPEN = {
    ("table_3", "resnet50 A2-Nets", "parameters"),
    ("table_3", "resnet50 A2-Nets", "multiply-adds"),
    ("table_3", "resnet50 GSoP-Net1", "multiply-adds"),
    ("table_3", "resnet50 AA-Net", "parameters"),
    ("table_3", "resnet50 AA-Net", "multiply-adds"),
    ("table_3", "resnet101 AA-Net", "parameters"),
    ("table_3", "resnet101 AA-Net", "multiply-adds"),
    ("table_5", "Mask R-CNN resnet50 GCNet", "parameters"),
}
LINES = {"table_2": 9, "table_3": 38, "table_a": 16, "table_5": 20, "table_6": 2}


@pytest.mark.parametrize("table", TABLES)
def test_agrees(table):
    lines = compare(table)
    assert len(lines) == LINES[table]
    for line in lines:
        key = (table, line.model, line.quantity)
        assert line.agrees == (key not in OPEN), line
        assert line.note.startswith("tried: ") == (key in OPEN)
        assert line.source in paper_tables()["sources"]


def noted(table, model, quantity="parameters"):
    (line,) = [x for x in compare(table) if (x.model, x.quantity) == (model, quantity)]
    return line.note


def test_an_open_row_names_its_readings():
    note = noted("table_3", "resnet50 A2-Nets")
    assert (
        "5 blocks in stages 2 and 3, m = n = C / 2: 32.907 x 10^6; 5 blocks in stages 2 and 3, m = n = C / 4: " in note
    )
    assert "last zero" not in note


@pytest.mark.parametrize(
    ("table", "model", "reading"),
    [
        ("table_3", "resnet101 AA-Net", "stages 2 to 4, relative positions"),
        ("table_5", "Mask R-CNN resnet50 GCNet", "timm's GC, addition, r = 16, stages 2 to 4; frozen too"),
    ],
)
def test_a_copied_number_agrees_to_the_digits_it_had(table, model, reading):
    note = noted(table, model)
    assert f"Without the last zero of the printed number these agree: {reading}" in note


def made(**kwargs):
    values = {"table": "table_3", "source": "paper", "model": "m", "quantity": "parameters", "unit": "2^20", "note": ""}
    return Comparison(**{**values, **kwargs})


def test_last_printed_digit():
    assert made(paper="24.37", here=24.3749).agrees
    assert not made(paper="24.37", here=24.3751).agrees
    assert made(paper="24.37", here=24.3751).here_printed == "24.38"
    assert made(paper="24.37", here=24.0).difference == pytest.approx(-0.37)


def test_flops_tolerance():
    assert made(quantity="multiply-adds", paper="10.00", here=10 * (1 + 0.99 * FLOPS_TOLERANCE)).agrees
    assert not made(quantity="multiply-adds", paper="10.00", here=10 * (1 - 1.01 * FLOPS_TOLERANCE)).agrees


def test_tables_are_whole():
    """What is printed can be read as a number, in a unit, from a source."""
    data = paper_tables()
    for table in data["tables"].values():
        assert table["source"] in data["sources"]
        for row in table["rows"]:
            assert row.get("source", "paper") in data["sources"]
            for key in {"params", "flops", "fps_train", "fps_infer", "top1", "top5", "ap", "ap50", "ap75"} & set(row):
                assert float(row[key]) > 0
                assert decimals(row[key]) <= 3
            for key in ("params_unit", "flops_unit"):
                assert row.get(key, table.get(key, "1")) in UNITS


def test_differences_that_the_text_states():
    """The gains the paper's text and supplement state in words follow from the tables, to the text's precision."""
    tables = paper_tables()["tables"]
    top1 = {(r["backbone"], r["method"]): float(r["top1"]) for t in ("table_3", "table_a") for r in tables[t]["rows"]}
    gain = {b: top1[b, "ECA-Net"] - top1[b, "ResNet"] for b, m in top1 if m == "ResNet"}
    assert gain["resnet50"] == pytest.approx(2.28)
    assert gain["resnet101"] == pytest.approx(1.8, abs=0.05)
    assert gain["resnet152"] == pytest.approx(1.3, abs=0.05)
    assert gain["resnet18"] == pytest.approx(0.38)
    assert gain["resnet34"] == pytest.approx(0.9)
    assert top1["mobilenetv2_100", "ECA-Net"] - top1["mobilenetv2_100", "SENet"] == pytest.approx(0.14)
    ap = {(r["detector"], r["backbone"], r["method"]): float(r["ap"]) for r in tables["table_5"]["rows"]}
    stated = {"Faster R-CNN": (0.3, 0.7), "Mask R-CNN": (0.3, 0.6), "RetinaNet": (0.2, 0.4)}
    for detector, gains in stated.items():
        for backbone, expected in zip(("resnet50", "resnet101"), gains):
            assert ap[detector, backbone, "ECA-Net"] - ap[detector, backbone, "SENet"] == pytest.approx(expected)

"""`pretrained=True` of this package's models: which source is asked, and what is said where there is none."""

import json
import shutil

from hub_client import digest

NET = "eca_mobilenetv2_050"
PUBLISHED = f"{NET}.ecanet_in1k"


def test_sources_digest_and_missing(server, client, folder, net):
    server.put(f"lab/{PUBLISHED}", folder)
    server.put(f"timm-eca/{PUBLISHED}", folder)
    server.fault("GET", f"for=timm-eca/{PUBLISHED}", "flip")
    found = client().run(
        f"""
import os
create = lambda name="{NET}", **kwargs: timm.create_model(name, pretrained=True, **kwargs)
attempt("flipped", create)
attempt("then whole", create)
os.environ["TIMM_ECA_HUB_ORG"] = "lab"
attempt("org", create)
attempt("tag", lambda: create("{PUBLISHED}"))
attempt("source", create, lambda model: model.pretrained_cfg["hf_hub_id"])
attempt("head", lambda: create(num_classes=3), lambda model: model.num_classes)
attempt("features", lambda: create(features_only=True), lambda model: model.pretrained_cfg["hf_hub_id"])
attempt("by id", lambda: create("hf-hub:timm-eca/{PUBLISHED}"))
attempt("missing", lambda: create("eca_resnet101"))
attempt("never released", lambda: create("eca_resnext50_32x4d"))
os.environ["TIMM_ECA_WEIGHTS"] = FOLDER
attempt("lab folder", lambda: create(cache_dir="empty"))
attempt("explicit id", lambda: create(pretrained_cfg_overlay=dict(hf_hub_id="lab/none")))
os.environ["TIMM_ECA_WEIGHTS"] = "nowhere"
attempt("no folder", create)
""".replace("FOLDER", repr(str(folder.parent)))
    )
    good = ["ok", digest(net)]
    assert found["flipped"][0] == "IntegrityError"
    for name in ("then whole", "org", "tag", "by id", "lab folder"):
        assert found[name] == good, name
    assert found["source"] == found["features"] == ["ok", f"lab/{PUBLISHED}"]
    assert found["head"] == ["ok", 3]
    assert found["missing"] == [
        "MissingWeightsError",
        f"lab/eca_resnet101.ecanet_in1k on {server.url} does not exist, or is private and HF_TOKEN or hf auth login"
        " is needed. The weights of eca_resnet101 are files of the paper's authors"
        " (https://github.com/BangguWu/ECANet), which must be converted: timm-eca convert CHECKPOINT"
        " DIR/eca_resnet101.ecanet_in1k --model eca_resnet101.ecanet_in1k, then set TIMM_ECA_WEIGHTS=DIR.",
    ]
    assert "released no weights of eca_resnext50_32x4d" in found["never released"][1]
    assert "lab/none" in found["explicit id"][1]
    assert "TIMM_ECA_WEIGHTS must be a folder" in found["no folder"][1]


def test_a_config_does_not_say_where_weights_are(server, client, folder, tmp_path):
    """Names of other sources in a repository's config do not switch the check off."""
    for name, further in (("file", {"hf_hub_filename": "model.safetensors"}), ("tensors", {"state_dict": {"x": 1}})):
        copy = shutil.copytree(folder, tmp_path / name)
        config = json.loads((copy / "config.json").read_text())
        config["pretrained_cfg"].update(further)
        (copy / "config.json").write_text(json.dumps(config))
        server.put(f"lab/{name}", copy)
    server.fault("GET", "for=lab/", "flip", times=-1)
    found = client().run(
        """
for name in ("file", "tensors"):
    attempt(name, lambda: timm.create_model(f"hf-hub:lab/{name}", pretrained=True))
"""
    )
    assert [kind for kind, _ in found.values()] == ["IntegrityError"] * 2

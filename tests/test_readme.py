"""What the README says is run and counted."""

import re

import timm
from safetensors.torch import save_file

from conftest import randomize_
from timm_eca import attn_modules
from timm_eca.models import ENTRYPOINTS

GRADIENTS = """
model(x).square().sum().backward()
layers = timm_eca.attn_modules(model)
print("without a gradient:", [path for path, layer in layers.items() if not layer.conv.weight.grad.abs().all()])
"""


def test_snippets_run(repository, server, client, tmp_path):
    """Each by itself, one after the other, with a Hub on loopback that has the pretrained weights they name."""
    (tmp_path / "published").mkdir()
    weights = randomize_(timm.create_model("resnet50")).state_dict()  # no norm starts at zero, as in a trained one
    save_file(weights, tmp_path / "published" / "model.safetensors")
    server.put("timm/resnet50.a1_in1k", tmp_path / "published")
    snippets = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 6
    snippets[0] += GRADIENTS
    code = "\n".join(f"exec({snippet!r}, {{}})" for snippet in snippets)
    exit_code, printed, errors = client().spawn(code, {}).wait()
    assert exit_code == 0, errors
    assert "layer1.0.se 1 64" in printed
    assert "'scale'" in printed
    assert "without a gradient: []" in printed


def test_model_table(repository):
    readme = (repository / "README.md").read_text()
    rows = re.findall(r"^\| `(eca_\w+)` \| ([\d, ]+) \| ([\d,]+) \| ([\d,]+) \|$", readme, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == sorted(f.__name__ for f in ENTRYPOINTS)
    for name, sizes, attention, total in rows:
        model = timm.create_model(name, device="meta")
        layers = attn_modules(model)
        per_stage = {site.stage: layers[site.path].conv.kernel_size[0] for site in model.attn_sites}
        assert sizes == ", ".join(map(str, per_stage.values()))
        assert attention == f"{sum(p.numel() for m in layers.values() for p in m.parameters()):,}"
        assert total == f"{sum(p.numel() for p in model.parameters()):,}"

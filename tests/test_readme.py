"""What the README says is run and counted."""

import re

import timm

from timm_eca import attn_modules
from timm_eca.models import ENTRYPOINTS


def test_snippets_run(repository, run_python):
    snippets = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 6
    printed = run_python("\n".join(snippets))
    assert "layer1.0.se 1 64" in printed
    assert "'scale'" in printed


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

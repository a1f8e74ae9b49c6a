"""The sites of one model as a table."""

from typing import Any

import timm
from torch import nn

from .inject import attn_modules, attn_sites
from .models import ENTRYPOINTS

__all__ = ["plan_table"]

HEADER = ("path", "stage", "channels", "kernel", "mode", "replaces")


def plan_table(name: str, attn_layer: str = "eca", attn_where: str = "auto") -> str:
    """Return where a layer goes in a timm model: one line a site.

    The columns are module path, stage, channels, kernel size of the layer's convolution (- where it has none), mode
    (`slot`: the block calls it; `gate`: the block's forward is made to) and what the layer replaces.

    Raises:
        ValueError: If the model takes no attention there, or a name is unknown.
    """
    carries = name in {entrypoint.__name__ for entrypoint in ENTRYPOINTS}
    asked: dict[str, Any] = {} if carries else {"attn_layer": attn_layer, "attn_where": attn_where}
    model = timm.create_model(name, device="meta", **asked)
    layers = attn_modules(model)
    rows = [
        (s.path, s.stage, s.channels, _kernel(layers[s.path]), "gate" if s.gate else "slot", s.replaces or "-")
        for s in attn_sites(model)
    ]
    lines = [HEADER, *[tuple(map(str, row)) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def _kernel(layer: nn.Module) -> str:
    convolution = next((m for m in layer.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))), None)
    return "-" if convolution is None else str(convolution.kernel_size[0])

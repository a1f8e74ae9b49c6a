"""DDP on CPUs for timm's train.py: `--device cpu --device-modules timm_eca.scripts.cpu_ddp`.

train.py names the device to `DistributedDataParallel` in any case, which refuses it for a model on the CPU. Imported
through timm's own `--device-modules`, this module puts a DDP in place that leaves the device out for such a model.
"""

from typing import Any

import torch
from torch import nn

__all__ = ["CpuDistributedDataParallel"]

_torch_ddp = nn.parallel.DistributedDataParallel


class CpuDistributedDataParallel(_torch_ddp):
    """DDP that takes, and does not need, `device_ids` for a model on the CPU."""

    def __init__(self, module: nn.Module, device_ids: list[int | torch.device] | None = None, **kwargs: Any):
        on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)


nn.parallel.DistributedDataParallel = CpuDistributedDataParallel  # type: ignore[assignment,misc]

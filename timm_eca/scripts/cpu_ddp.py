"""DDP and `--sync-bn` on CPUs for timm's train.py: `--device cpu --device-modules timm_eca.scripts.cpu_ddp`.

train.py names the device to `DistributedDataParallel` in any case, which refuses it for a model on the CPU, and
PyTorch's SyncBatchNorm trains on accelerators alone. Imported through timm's own `--device-modules`, this module puts
in place a DDP that leaves the device out for such a model, and a SyncBatchNorm that takes its input.
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

__all__ = ["CpuDistributedDataParallel"]

_torch_ddp = nn.parallel.DistributedDataParallel
_torch_forward = nn.SyncBatchNorm.forward


class CpuDistributedDataParallel(_torch_ddp):
    """DDP that takes, and does not need, `device_ids` for a model on the CPU."""

    def __init__(self, module: nn.Module, device_ids: list[int | torch.device] | None = None, **kwargs: Any):
        self._on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        super().__init__(module, device_ids=None if self._on_cpu else device_ids, **kwargs)

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        if not self._on_cpu:  # for a model on the CPU all it does is to refuse
            super()._passing_sync_batchnorm_handle(module)


def _forward(self: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    if x.device.type != "cpu" or not self.training or not distributed.is_initialized():
        return _torch_forward(self, x)
    wide = torch.promote_types(x.dtype, torch.float32)  # under autocast statistics are of float32, as PyTorch's are
    return _normalized_by_all(self, x.to(wide)).to(x.dtype)


def _normalized_by_all(norm: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalize by the mean and variance of all processes' inputs, (B, C, ...) -> (B, C, ...), and keep them."""
    group = norm.process_group or distributed.group.WORLD
    others = [d for d in range(x.dim()) if d != 1]
    count = all_reduce(x.new_tensor(x.numel() / x.shape[1]), group=group)
    mean = all_reduce(x.sum(others), group=group) / count
    centred = x - _by_channel(mean, x)
    variance = all_reduce(centred.square().sum(others), group=group) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.detach(), share)
        norm.running_var.lerp_(variance.detach() * count / (count - 1), share)
    y = centred * _by_channel((variance + norm.eps).rsqrt(), x)
    return y if norm.weight is None else y * _by_channel(norm.weight, x) + _by_channel(norm.bias, x)


def _by_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


nn.parallel.DistributedDataParallel = CpuDistributedDataParallel  # type: ignore[assignment,misc]
nn.SyncBatchNorm.forward = _forward  # type: ignore[method-assign,assignment]

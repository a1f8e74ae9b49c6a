"""A small script that stands where timm's train.py would: three steps of an ECA model, alone or under torchrun.

`train.py OUT`: each rank writes `OUT/rank{n}.pt` with its losses and its weights after the last step.
"""

import os
import sys

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import distributed, nn

BATCH, STEPS = 8, 3


def main(out):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        distributed.init_process_group("gloo")
        import timm_eca.scripts.cpu_ddp  # noqa: F401  # as `--device-modules` does
    results = {norm: train(norm, rank, world) for norm in ("groupnorm", "batchnorm", "sync-bn")}
    torch.save(results, os.path.join(out, f"rank{rank}.pt"))
    if world > 1:
        distributed.destroy_process_group()


def train(norm, rank, world):
    """Batch norm's statistics are each rank's own; with the others the gradient is that of the summed batch."""
    torch.manual_seed(rank)  # each rank starts from other weights, DDP gives all those of rank 0
    layer = "batchnorm" if norm == "sync-bn" else norm
    model = timm.create_model("resnet18", attn_layer="eca", norm_layer=layer, num_classes=4).double()
    if world > 1:
        model = convert_sync_batchnorm(model) if norm == "sync-bn" else model
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
        targets = torch.randint(4, (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rank::world]), targets[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module = model.module if world > 1 else model
    return {"losses": torch.tensor(losses, dtype=torch.float64), "weights": module.state_dict()}


if __name__ == "__main__":
    main(sys.argv[1])

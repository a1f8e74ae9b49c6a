"""Bytes kept for the backward pass, per image, counted exactly: what autograd saves in one training step's forward.

Storages are counted once each, however many operations keep them; parameters and buffers are not, they live anyway.
"""

import argparse
import json
from pathlib import Path

import torch
from measure import environment
from systems import SYSTEMS, create
from torch import nn

MODELS = ("resnet18", "resnet50", "resnet101", "mobilenetv2_100")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="pixels of each side (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json", help="JSON file (default: %(default)s)")
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    mib = {m: {s: saved_bytes(create(m, s), torch.randn(shape)) / args.batch / 2**20 for s in SYSTEMS} for m in MODELS}
    results = {"mib_per_image": mib, "batch": args.batch, "size": args.size, "environment": environment()}
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a forward in training mode keeps for its backward pass."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(x).sum()
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def markdown(results: dict) -> str:
    """Return the table: MiB, and in brackets the ratio to the plain backbone."""
    lines = ["| backbone | " + " | ".join(SYSTEMS) + " |", "|---" + "|---:" * len(SYSTEMS) + "|"]
    for model, mib in results["mib_per_image"].items():
        cells = [f"{mib[system]:.1f} ({mib[system] / mib['plain']:.4f})" for system in SYSTEMS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

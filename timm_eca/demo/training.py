"""Training with timm's own loader, optimizer, scheduler and metrics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import nn
from torch.utils.data import DataLoader

__all__ = ["AUGMENTATION", "BATCH_SIZE", "DATA_CONFIG", "History", "make_loaders", "train"]

DATA_CONFIG: dict[str, Any] = {
    "input_size": (1, 32, 32),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
AUGMENTATION: dict[str, Any] = {"hflip": 0.0, "color_jitter": None, "scale": (0.8, 1.0), "ratio": (0.9, 1.1)}
BATCH_SIZE = 64
LEARNING_RATE = 0.05


@dataclass
class History:
    """One number per epoch: mean training loss, validation loss and validation top-1 in percent; seconds in all."""

    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    seconds: float = 0.0


def make_loaders(
    root: Path,
    data_config: Mapping[str, Any] = DATA_CONFIG,
    augmentation: Mapping[str, Any] = AUGMENTATION,
    workers: int = 0,
) -> tuple[DataLoader, DataLoader]:
    """Return the training and the validation loader of an image folder, by default of grey digits."""
    shared: dict[str, Any] = {**data_config, "batch_size": BATCH_SIZE, "use_prefetcher": False, "num_workers": workers}
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    datasets = [create_dataset("", str(root), split=split, input_img_mode=mode) for split in ("train", "val")]
    train_loader = create_loader(datasets[0], **shared, **augmentation, is_training=True, persistent_workers=False)
    return train_loader, create_loader(datasets[1], **shared, persistent_workers=False)


def train(model: nn.Module, loaders: tuple[DataLoader, DataLoader], epochs: int, seed: int, label: str) -> History:
    """Train a classifier with SGD and a cosine schedule, validating after each epoch, where it lies."""
    from tqdm import tqdm

    random_seed(seed)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=min(1, epochs - 1))
    loss_fn = nn.CrossEntropyLoss()
    history = History()
    started = time.perf_counter()
    with tqdm(total=epochs * len(loaders[0]), desc=label, unit="step") as bar:
        for epoch in range(epochs):
            history.train_loss.append(_train_epoch(model, loaders[0], optimizer, loss_fn, bar))
            val_loss, top1 = _validate(model, loaders[1], loss_fn)
            history.val_loss.append(val_loss)
            history.top1.append(top1)
            scheduler.step(epoch + 1)
            bar.set_postfix(epoch=epoch + 1, loss=f"{history.train_loss[-1]:.3f}", top1=f"{top1:.2f}%")
    history.seconds = time.perf_counter() - started
    return history


def _train_epoch(model: nn.Module, loader: DataLoader, optimizer, loss_fn: nn.Module, bar) -> float:
    losses = AverageMeter()
    model.train()
    device = next(model.parameters()).device
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        loss = loss_fn(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(images))
        bar.update()
    return losses.avg


@torch.inference_mode()
def _validate(model: nn.Module, loader: DataLoader, loss_fn: nn.Module) -> tuple[float, float]:
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    device = next(model.parameters()).device
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        logits = model(images)
        losses.update(loss_fn(logits, targets).item(), len(images))
        top1.update(accuracy(logits, targets)[0].item(), len(images))
    return losses.avg, top1.avg

"""The demo's two pictures: training curves, and channel weights per class as in the paper's supplement, Figure B."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..inject import attn_modules
from .training import History

__all__ = ["mean_channel_weights", "plot_channel_weights", "plot_curves"]


@torch.inference_mode()
def mean_channel_weights(model: nn.Module, batches: Iterable, classes: int) -> dict[str, torch.Tensor]:
    """Return each attention layer's mean channel weights per class, (classes, C), by module path."""
    layers = attn_modules(model)
    sums = {path: torch.zeros(classes, 0) for path in layers}
    counts = torch.zeros(classes)
    weights: dict[str, torch.Tensor] = {}

    def keep(path):
        return lambda layer, inputs, _: weights.update({path: layer.channel_weights(inputs[0])})

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    model.eval()
    for images, targets in batches:
        model(images)
        one_hot = nn.functional.one_hot(targets, classes).to(images.dtype)
        counts += one_hot.sum(0)
        for path, gates in weights.items():
            per_class = one_hot.T @ gates
            sums[path] = per_class if sums[path].numel() == 0 else sums[path] + per_class
    for handle in handles:
        handle.remove()
    return {path: total / counts[:, None] for path, total in sums.items()}


def plot_curves(histories: Mapping[str, History], path: Path) -> None:
    """Plot training loss and validation top-1 over the epochs, one line per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    for label, history in histories.items():
        epochs = range(1, len(history.top1) + 1)
        loss_axes.plot(epochs, history.train_loss, marker=".", label=label)
        top1_axes.plot(epochs, history.top1, marker=".", label=label)
    loss_axes.set(xlabel="epoch", ylabel="training loss (cross entropy)", yscale="log")
    top1_axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    top1_axes.legend()
    figure.suptitle("scikit-learn digits, one seed")
    figure.savefig(path, dpi=150)


def plot_channel_weights(per_layer: Mapping[str, torch.Tensor], classes: Iterable[str], path: Path) -> None:
    """Plot each layer's mean channel weights: one thin line per class, their mean in black."""
    from matplotlib.figure import Figure

    names = list(classes)
    columns = (len(per_layer) + 1) // 2
    figure = Figure(figsize=(3.2 * columns, 5.5), layout="constrained")
    for axes, (layer, weights) in zip(figure.subplots(2, columns, squeeze=False).flat, per_layer.items()):
        for name, line in zip(names, weights):
            axes.plot(line.numpy(), linewidth=0.5, label=name)
        axes.plot(weights.mean(0).numpy(), linewidth=1, color="black", label="mean")
        axes.set_title(layer, fontsize=9)
        axes.set(xlabel="channel", ylabel="weight")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle("Mean channel weights per class, validation images")
    figure.savefig(path, dpi=150)

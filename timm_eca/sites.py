"""A place for one layer in one model: the second of the three forms (spec, sites, model)."""

from dataclasses import dataclass

from torch import nn

from .block_rule import rule_key
from .gating import Gate, gain_name

__all__ = ["Site", "family_of"]


@dataclass(frozen=True)
class Site:
    """One place for one layer in one model.

    Attributes:
        path: Module path at which the layer goes.
        stage: Number of the stage, the first being 1.
        channels: Channels of the tensor that the layer gates.
        like: Path of the module whose weight tells the layer's device and dtype.
        scales: Paths of the tensors that scale the gated tensor linearly, `/` before those that do so inversely;
            empty where no tensor does.
        block: Path of the block whose forward is made to call the layer, None where it does so already.
        gate: How that forward calls the layer.
        replaces: Class name of the module that gives way to the layer, None for an empty place.
        removes: Paths of squeeze-and-excitation modules elsewhere in the block that give way too.
    """

    path: str
    stage: int
    channels: int
    like: str
    scales: tuple[str, ...] = ()
    block: str | None = None
    gate: Gate | None = None
    replaces: str | None = None
    removes: tuple[str, ...] = ()

    @property
    def gain(self) -> str | None:
        """Path of the buffer that scales the gated tensor where no weights of the model do, None elsewhere."""
        return f"{self.block}.{gain_name(self.gate.child)}" if self.gate and self.gate.gain else None


def family_of(model: nn.Module) -> str:
    """Return the name of timm's module that a model's class is from."""
    return rule_key(type(model)).partition(":")[0]

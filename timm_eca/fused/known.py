"""What was found out about a tail's tensors at one call, for the next ones whose tensors are like them.

Between two convolutions the caches are empty, and to look at ten tensors one by one takes longer than a small tail.
PyTorch's guards, which tell whether a compiled graph may be used again, look at all of them in one call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "Known", "Tensors"]

CLASSES = (Tensor, nn.Parameter)  # of tensors; any other may have operations of its own
Tensors = tuple[Tensor | None, ...]

_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


class Known:
    """What takes tensors of certain classes, types, layouts, sizes and devices.

    Args:
        tensors: Those that were looked at, None where there is none.
        engine: The passes that take them.
        infer: The tail of such tensors in inference, in place, where there is a short way to it.
    """

    __slots__ = ("_count", "_like", "engine", "infer")

    def __init__(self, tensors: Tensors, engine: Any, infer: Callable[[Tensors, float], None] | None) -> None:
        present = [t for t in tensors if t is not None]
        self._count = len(present)
        self._like = _Guards and _Guards(*present, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.engine = engine
        self.infer = infer

    def holds(self, tensors: Tensors) -> bool:
        """Whether other tensors, in the same order, are like them."""
        present = [t for t in tensors if t is not None]
        return self._like is not None and len(present) == self._count and self._like(*present)

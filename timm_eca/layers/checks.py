"""Checks of the arguments that layers have in common."""

import math
import numbers
import operator
from typing import Any

from timm.layers import LayerType, get_act_layer
from torch import nn

__all__ = ["activation", "finite", "odd_kernel_size", "positive_int", "reduced_channels", "size_of_map"]


def activation(name: str, value: LayerType) -> Any:
    """Return the class, partial or function that makes an activation.

    Raises:
        ValueError: If it is neither that nor the name of one that timm has.
    """
    try:
        found = get_act_layer(value)
    except KeyError:
        found = None
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(
            f"{name} must be the name of a timm activation ('sigmoid', 'hard_sigmoid', ...) or a module class,"
            f" got {value!r}."
        )
    return found


def finite(name: str, value: float) -> float:
    """Return a number.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return value


def size_of_map(name: str, value: object) -> tuple[int, int]:
    """Return height and width.

    Raises:
        ValueError: If they are not two positive integers.
    """
    size = tuple(map(_int_or_zero, value)) if isinstance(value, (tuple, list)) else ()
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name} must be a height and a width, such as (7, 7), got {value!r}.")
    return size


def positive_int(name: str, value: int) -> int:
    """Return an argument as an int.

    Raises:
        ValueError: If it is not a positive integer.
    """
    number = _int_or_zero(value)
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return number


def reduced_channels(channels: int, reduction: int) -> tuple[int, int]:
    """Return a number of channels, and what a reduction leaves of it: at least one.

    Raises:
        ValueError: If either is not a positive integer.
    """
    channels, reduction = positive_int("channels", channels), positive_int("reduction", reduction)
    return channels, max(channels // reduction, 1)


def odd_kernel_size(value: int, name: str = "kernel_size", accepted: str = "") -> int:
    """Return a kernel size as an int.

    Args:
        value: The argument.
        name: Its name.
        accepted: What else the caller accepts, for the message.

    Raises:
        ValueError: If it is not an odd positive integer.
    """
    number = _int_or_zero(value)
    if number < 1 or number % 2 == 0:
        raise ValueError(f"{name} must be an odd positive integer (1, 3, 5, ...){accepted}, got {value!r}.")
    return number


def _int_or_zero(value: object) -> int:
    if isinstance(value, bool):
        return 0
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return 0

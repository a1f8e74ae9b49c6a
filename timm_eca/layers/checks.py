"""Checks of the arguments that layers have in common."""

import operator

__all__ = ["odd_kernel_size", "positive_int", "reduced_channels"]


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

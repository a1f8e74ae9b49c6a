"""The errors of this package that are not plain ValueErrors, and words that messages have in common."""

from collections.abc import Iterable
from typing import Any

__all__ = ["CommandError", "IntegrityError", "MissingWeightsError", "WeightsError", "some"]


class CommandError(ValueError):
    """Something the user can mend: what was given, and what is accepted. One line and exit code 2 on the console."""


class WeightsError(RuntimeError):
    """Weights that cannot be had: what was asked, why it failed, what to do."""


class MissingWeightsError(WeightsError):
    """A repository or a file that is not there, or not visible to this user."""


class IntegrityError(WeightsError):
    """Weights that are not what their config says they are."""


def some(items: Iterable[Any], separator: str = ", ", count: int = 4) -> str:
    """Return the first few items in words, and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more

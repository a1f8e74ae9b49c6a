"""The errors of this package that are not plain ValueErrors."""

__all__ = ["CommandError", "IntegrityError", "MissingWeightsError", "WeightsError"]


class CommandError(ValueError):
    """Something the user can mend: what was given, and what is accepted. One line and exit code 2 on the console."""


class WeightsError(RuntimeError):
    """Weights that cannot be had: what was asked, why it failed, what to do."""


class MissingWeightsError(WeightsError):
    """A repository or a file that is not there, or not visible to this user."""


class IntegrityError(WeightsError):
    """Weights that are not what their config says they are."""

"""The error that the command line turns into one line and exit code 2."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """Something the user can mend: what was given, and what is accepted."""

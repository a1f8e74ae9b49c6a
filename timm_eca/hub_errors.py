"""Failures of the Hub's client: tried again where they pass, told in one line with what to do where they stay."""

import logging
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import MissingWeightsError, WeightsError

__all__ = ["explain", "with_retries"]

_logger = logging.getLogger(__name__)

ATTEMPTS = 3
RETRY_SECONDS = 1.0


def with_retries(call: Callable[[], Any], hub_id: str, filename: str) -> Any:
    """Make a call to the Hub, again where the failure is a passing one, and explain an error that stays."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _passing(error):
                raise explain(error, hub_id, filename) from error
            _logger.warning("%s of %s: %s. Trying again.", filename, hub_id, _first_line(error))
            time.sleep(RETRY_SECONDS * attempt)


def _passing(error: Exception) -> bool:
    # The client's HTTP library differs by version, httpx2, httpx or requests, and so do the classes; not their names.
    # Python's own ConnectionError is hf_xet's, which has tried for minutes then.
    names = {base.__name__ for base in type(error).mro() if base.__module__ != "builtins"}
    if names & {"TransportError", "ConnectionError"}:
        return True
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return "Consistency check failed" in str(error) or (isinstance(error, HfHubHTTPError) and status >= 500)


def explain(error: Exception, hub_id: str, filename: str) -> WeightsError:
    """Return a failure of the Hub's client in one line that says what to do."""
    where = f"{hub_id} on {constants.ENDPOINT}"
    if isinstance(error, GatedRepoError):
        return WeightsError(f"{where} is gated: ask for access on its page, then log in (hf auth login, or HF_TOKEN).")
    if isinstance(error, RepositoryNotFoundError):
        return MissingWeightsError(f"{where} does not exist, or is private and HF_TOKEN or hf auth login is needed.")
    if isinstance(error, RevisionNotFoundError):
        return MissingWeightsError(f"{where} has no such revision.")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        reason = f": {_first_line(error.__cause__)}" if error.__cause__ else "."
        return WeightsError(
            f"{filename} of {where} is not in the cache, and the Hub is offline or cannot be reached{reason}"
        )
    if isinstance(error, EntryNotFoundError):
        return MissingWeightsError(f"{where} has no {filename}.")
    return WeightsError(f"{filename} of {where}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]

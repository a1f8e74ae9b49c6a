"""Failures of the Hub's client: tried again where they pass, told in one line with what to do where they stay."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import MissingWeightsError, WeightsError

__all__ = ["UPLOAD", "explain", "with_retries"]

_logger = logging.getLogger(__name__)

ATTEMPTS = 3
RETRY_SECONDS = 1.0
UPLOAD = "the upload"

# What the client adds to the Hub's answer: numbers of requests, and addresses, which ours give already.
_NOISE = re.compile(
    r"\((?:Request|Amzn Trace|Amz CF) ID: [^)]*\)|For more information check: \S+"
    r"|(?:for url:?|Cannot access content at:|Url:) '?[^\s']+'?"
)
_SAID_ALREADY = ("repository not found", "invalid username or password")


def with_retries(call: Callable[[], Any], hub_id: str, what: str) -> Any:
    """Make a call to the Hub, again where the failure is a passing one, and explain an error that stays."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _passing(error):
                raise explain(error, hub_id, what) from error
            _logger.warning("%s of %s: %s. Trying again.", what, hub_id, _reason(error))
            time.sleep(RETRY_SECONDS * attempt)


def _passing(error: Exception) -> bool:
    # The client's HTTP library differs by version, httpx2, httpx or requests, and so do the classes; not their names.
    # Python's own ConnectionError is hf_xet's, which has tried for minutes then.
    names = {base.__name__ for base in type(error).mro() if base.__module__ != "builtins"}
    if names & {"TransportError", "ConnectionError"}:
        return True
    return "Consistency check failed" in str(error) or (isinstance(error, HfHubHTTPError) and _status(error) >= 500)


def _status(error: BaseException) -> int:
    """Return the status of the answer that an error tells of, 0 if there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def explain(error: Exception, hub_id: str, what: str) -> WeightsError:
    """Return a failure of the Hub's client in one line that says what to do."""
    where = f"{hub_id} on {_masked(constants.ENDPOINT)}"
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"{where} is gated: ask for access on its page, then log in (hf auth login, or HF_TOKEN).{_hub_says(error)}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return MissingWeightsError(
            f"{where} does not exist, or is private and HF_TOKEN or hf auth login is needed.{_hub_says(error)}"
        )
    if isinstance(error, RevisionNotFoundError):
        return MissingWeightsError(f"{where} has no such revision.")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        cause = error.__cause__
        if isinstance(cause, FileMetadataError) or (isinstance(cause, Exception) and 0 < _status(cause) < 500):
            return explain(cause, hub_id, what)  # it was reached, and answered
        reason = f": {_reason(cause)}" if cause else "."
        failed = ":" if what == UPLOAD else " is not in the cache, and"
        return WeightsError(f"{what} of {where}{failed} the Hub is offline or cannot be reached{reason}")
    if isinstance(error, EntryNotFoundError):
        return MissingWeightsError(f"{where} has no {what}.")
    return WeightsError(f"{what} of {where}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """Return a failure in one line, with all that the Hub answered."""
    return _masked(" ".join(f"{type(error).__name__}: {_NOISE.sub('', str(error))}".split()))


def _hub_says(error: Exception) -> str:
    """Return what the Hub answered as a further sentence, nothing if that is not more than what ours says."""
    lines = [line.strip().rstrip(".") for line in (getattr(error, "server_message", None) or "").splitlines()]
    news = [line for line in lines if line and line.lower() not in _SAID_ALREADY]
    return _masked(f" The Hub says: {'. '.join(news)}.") if news else ""


def _masked(text: str) -> str:
    """Return a text without the names and passwords that addresses in it hold, such as HF_ENDPOINT's."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)

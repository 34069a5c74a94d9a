"""Calls to the Hub that are made again when they failed of something that passes."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from huggingface_hub import errors

from .errors import summary

logger = logging.getLogger(__name__)

WAITS = (1.0, 3.0, 9.0)  # seconds before each further attempt
LONGEST_WAIT = 60.0  # that a server may ask for
_PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
_Result = TypeVar("_Result")


def retrying(call: Callable[[], _Result], *, waits: Sequence[float] | None = None) -> _Result:
    """The result of `call`, which is made again after each of `waits` while it fails of something that passes.

    That is: the server's own trouble, a request to slow down, a commit of somebody else in between, a connection that
    broke, a download that ended early. Refusals and a server that cannot be reached at all are raised at once, as is
    the last failure.
    """
    for wait in WAITS if waits is None else waits:
        try:
            return call()
        except Exception as error:  # whatever the client and the transport below it raise
            if not passes(error):
                raise
            delay = min(max(wait, _asked_for(error)), LONGEST_WAIT)
            logger.warning("the Hub: %s; trying again in %.0f s", summary(error), delay)
            time.sleep(delay)
    return call()


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _PASSING
    if isinstance(error, errors.LocalEntryNotFoundError):  # raised of what kept the client from asking the Hub
        return error.__cause__ is not None and passes(error.__cause__)
    names = {each.__name__ for each in type(error).__mro__}
    if names & {"ConnectError", "ProxyError", "UnsupportedProtocol", "LocalProtocolError"}:
        return False
    return "TransportError" in names or (isinstance(error, OSError) and "Consistency check failed" in str(error))


def _asked_for(error: Exception) -> float:
    """Seconds that the server asks to wait, 0 if it does not say."""
    try:
        return float(error.response.headers.get("Retry-After", 0))  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return 0.0

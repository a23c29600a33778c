"""Read the answers of an HTTP endpoint: bodies of limited size, and whether a retry may help.

Uses the standard library: httpx and tenacity limit neither the time of a whole answer (their time-outs restart with
every byte) nor its size, and would be the only packages that the `vlm` scorer needs besides NumPy and Pillow.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import math
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import Any

MAX_ANSWER_BYTES = 1 << 20


class TransientError(Exception):
    """A failure that may be temporary; a retry may succeed."""


class BusyError(Exception):
    """The endpoint asks to retry later: after retry_after_s seconds, or 0 if it does not say when."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RefusedError(Exception):
    """A failure that a retry would not change."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes redirects appear as HTTP errors with their own status."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow no redirect, which could send the API key to another host."""


def retry_after_of(headers: Message) -> float:
    """Return the seconds that an answer asks to wait, as a number or a date; 0 if it does not say."""
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        text = headers.get(name, "").strip()
        with contextlib.suppress(ValueError):
            seconds = float(text) * unit_s
            return seconds if 0 < seconds < math.inf else 0.0
        with contextlib.suppress(ValueError, TypeError):
            return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


def read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return a whole answer; TimeoutError after `deadline` (time.monotonic()), TransientError if it is too long.

    The timeout of the socket is not enough, because it restarts with every byte.
    """
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MAX_ANSWER_BYTES:
            raise TransientError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    return body


def body_of(error: urllib.error.HTTPError) -> str:
    """Return the body of an HTTP error, "" if it cannot be read."""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        return error.read(MAX_ANSWER_BYTES).decode(errors="replace")
    return ""

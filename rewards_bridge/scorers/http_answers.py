"""What an HTTP endpoint answers: its body within bounds, and whether another try may go better.

On the standard library: httpx and tenacity bound neither the time of a whole answer (their time-outs start anew with
every byte) nor its size, and would be all that the interpreter of the `vlm` scorer needs beside NumPy and Pillow.
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
    """The next try may go better."""


class BusyError(Exception):
    """The endpoint asks to be asked later: after retry_after_s seconds, if it says so (else 0)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RefusedError(Exception):
    """The next try would go the same way."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to be reported as the HTTP status that it is."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow no redirect: it would carry the API key to another host."""


def retry_after_of(headers: Message) -> float:
    """Return the seconds that an answer asks to wait, by a number or a date; 0 if it does not say."""
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        text = headers.get(name, "").strip()
        with contextlib.suppress(ValueError):
            seconds = float(text) * unit_s
            return seconds if 0 < seconds < math.inf else 0.0
        with contextlib.suppress(ValueError, TypeError):
            return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


def read_body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return all of an answer; TimeoutError at `deadline` of time.monotonic(), TransientError if it is too long.

    The socket's own timeout starts anew with every byte that trickles in.
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
    """Return what an HTTP error says in its body, as far as it can be read."""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        return error.read(MAX_ANSWER_BYTES).decode(errors="replace")
    return ""

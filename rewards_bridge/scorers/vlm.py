"""A vision-language model as judge, behind any OpenAI-compatible /v1/chat/completions endpoint."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent import futures
from email.message import Message
from itertools import count
from typing import Any

import numpy as np
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores, check_batch

TEMPLATE = (
    "This image was made for the following prompt.\n\nPrompt: {prompt}\n\n"
    "How well does the image show what the prompt asks for? Answer in one line with a number from 0 (not at all) to 10 "
    "(everything is there and right), written as: Score: NUMBER"
)
PATTERN = r"(?i)score\W{0,10}?(-?\d+(?:\.\d+)?)"
FIELDS = '{"temperature": 0, "max_tokens": 512}'

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""
MAX_ANSWER_BYTES = 1 << 20
MAX_SHOWN = 500
"""Characters of an answer shown in an error or kept as a reason."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class VlmScorer:
    """Asks a model for a number: score = (number - low) / (high - low), raw = the number itself.

    An answer without a number from low to high is asked for again, and an error if that does not help: no score is
    made up. Options:
        url             the endpoint up to /v1, or all of it up to /chat/completions
        model           the name that the endpoint knows the model by
        template        what is asked; {prompt} is replaced by the image's prompt
        pattern         regular expression with one group, the number; its last match in the answer counts
        low, high       the scale that the template asks for
        timeout_s       seconds for one answer
        retries         how often a failed or unreadable answer is asked for again, after 0.5, 1, 2, ... 30 s
        concurrency     images asked about at a time
        api_key_env     environment variable that holds the API key, if the endpoint wants one
        fields          JSON object of further fields of the request
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str = TEMPLATE,
        pattern: str = PATTERN,
        low: float = 0.0,
        high: float = 10.0,
        timeout_s: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        api_key_env: str = "",
        fields: str = FIELDS,
    ) -> None:
        self._key = _api_key(api_key_env)
        self._url = _endpoint(url, bool(self._key))
        self._model = model
        self._template = template
        self._pattern = _compiled(pattern)
        self._low, self._high = low, high
        self._timeout_s, self._retries, self._concurrency = timeout_s, retries, concurrency
        self._fields = _json_object(fields)
        # A redirect would carry the API key to another host.
        self._opener = urllib.request.build_opener(_NoRedirect)
        if "{prompt}" not in template:
            raise UsageError(f"the vlm scorer's template has no {{prompt}} to be replaced; found {template!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"the vlm scorer wants low < high, both finite; found low={low}, high={high}")
        if not (timeout_s > 0 and retries >= 0 and concurrency >= 1):
            raise UsageError(
                "the vlm scorer wants timeout_s > 0, retries >= 0 and concurrency >= 1; "
                f"found timeout_s={timeout_s}, retries={retries}, concurrency={concurrency}"
            )

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judges images u8[B,H,W,3] by their prompts; raw["vlm"] is the model's number, a reason its answer.

        Raises ValueError for images of another form, RuntimeError, naming the image, if no number can be had for one.
        """
        check_batch("vlm", images, prompts, metadata)
        stop = threading.Event()
        with futures.ThreadPoolExecutor(self._concurrency, thread_name_prefix="vlm") as pool:
            jobs = [pool.submit(self._judge, stop, *job) for job in zip(count(), images, prompts)]
            try:
                answers = [job.result() for job in jobs]
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        number = np.array([value for value, _ in answers], dtype=np.float32)
        score = (number - np.float32(self._low)) / np.float32(self._high - self._low)
        return Scores(score=score, raw={"vlm": number}, reasons=[text for _, text in answers])

    def _judge(self, stop: threading.Event, index: int, image: np.ndarray, prompt: str) -> tuple[float, str]:
        """The number for one image and the answer that it stands in; stop ends the waiting between tries."""
        request = self._request(image, prompt)
        failure: _TransientError | None = None
        for tried in range(self._retries + 1):
            if tried and stop.wait(min(FIRST_BACKOFF_S * 2 ** (tried - 1), MAX_BACKOFF_S)):
                raise futures.CancelledError
            try:
                text = self._ask(request)
                return self._number(text), text.strip()[:MAX_SHOWN]
            except _TransientError as error:
                failure = error
            except _RefusedError as error:
                raise RuntimeError(f"vlm: {self._url} refused image {index} (prompt {prompt!r}): {error}") from error
        raise RuntimeError(
            f"vlm: no score for image {index} (prompt {prompt!r}) after {self._retries + 1} tries at {self._url}; "
            f"the last: {failure}"
        ) from failure

    def _request(self, image: np.ndarray, prompt: str) -> urllib.request.Request:
        content = [
            {"type": "text", "text": self._template.replace("{prompt}", prompt)},
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
        ]
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], **self._fields}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        return request

    def _ask(self, request: urllib.request.Request) -> str:
        """The text of one answer."""
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            kind = _TransientError if error.code in RETRIED else _RefusedError
            raise kind(f"HTTP status {error.code} {self._shown(_body_of(error))}") from None
        except TimeoutError:
            raise _TransientError(f"no answer within timeout_s={self._timeout_s}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _TransientError(self._shown(f"{type(error).__name__}: {error}")) from None
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            shown = self._shown(body.decode(errors="replace"))
            raise _TransientError(f"no text at choices[0].message.content of the answer {shown}")
        return text

    def _number(self, text: str) -> float:
        """The number in an answer."""
        found = [match[1] for match in self._pattern.finditer(text)]
        wanted = f"a number from {self._low} to {self._high} matching {self._pattern.pattern!r}"
        if not found:
            raise _TransientError(f"wanted {wanted}, found none in the answer {self._shown(text)}")
        try:
            number = float(found[-1])
        except (TypeError, ValueError):
            number = math.nan
        if not self._low <= number <= self._high:
            raise _TransientError(f"wanted {wanted}, found {found[-1]!r} in the answer {self._shown(text)}")
        return number

    def _shown(self, text: str) -> str:
        """A text from outside for an error message: short, and without the key, which some servers repeat."""
        return repr((text.replace(self._key, "***") if self._key else text)[:MAX_SHOWN])


class _TransientError(Exception):
    """The next try may go better."""


class _RefusedError(Exception):
    """The next try would go the same way."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to be reported as the HTTP status that it is."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of an answer; the socket's own timeout starts anew with every byte that trickles in."""
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > MAX_ANSWER_BYTES:
            raise _TransientError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    return body


def _body_of(error: urllib.error.HTTPError) -> str:
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        return error.read(MAX_ANSWER_BYTES).decode(errors="replace")
    return ""


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _endpoint(url: str, has_key: bool) -> str:
    """The address to post to; a key is not sent in the clear to another machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"the vlm scorer's url has to start with http:// or https:// and name a host; found {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the vlm scorer's url holds a user, a password, a query or a fragment; leave them out, and name the "
            "environment variable with the API key by api_key_env"
        )
    if has_key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UsageError(
            f"refusing to send the API key unencrypted to {parts.hostname}; use https://, or a tunnel to localhost"
        )
    path = parts.path.rstrip("/")
    return url.rstrip("/") if path.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions"


def _api_key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(
            f"the vlm scorer's api_key_env names {variable}, which is not set in its process; export it before the "
            "start, or leave api_key_env out if the endpoint wants no key"
        )
    return key


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the vlm scorer's pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise UsageError(
            f"the vlm scorer's pattern needs exactly one group, the number; {pattern!r} has {compiled.groups} "
            "(a group that is not the number is written (?:...))"
        )
    return compiled


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the vlm scorer's fields are no JSON: {error}; found {text!r}") from error
    taken = {"model", "messages"} & set(found) if isinstance(found, dict) else set()
    if not isinstance(found, dict) or taken:
        raise UsageError(f"the vlm scorer's fields have to be a JSON object without model and messages; found {text}")
    return found

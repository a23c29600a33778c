"""A vision-language model as judge, behind any OpenAI-compatible /v1/chat/completions endpoint."""

from __future__ import annotations

import base64
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
from itertools import count
from typing import Any

import numpy as np
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.http_answers import (
    BusyError,
    NoRedirect,
    RefusedError,
    TransientError,
    body_of,
    read_body,
    retry_after_of,
)
from rewards_bridge.scorers.verdict_text import UnreadableError, read_verdict

TEMPLATE = (
    "This image was made for the following prompt.\n\nPrompt: {prompt}\n\n"
    "How well does the image show what the prompt asks for? Answer in one line with a number from 0 (not at all) to 10 "
    "(everything is there and right), written as: Score: NUMBER"
)
FIELDS = '{"temperature": 0, "max_tokens": 512}'

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""
MAX_SHOWN = 500
"""Characters of an answer shown in an error or kept as a reason."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
FINISHED = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")
"""Values of finish_reason of an answer that is whole; some servers say nothing."""
TAKEN_FIELDS = ("model", "messages", "stream", "n")
DEADLINE_PART = 0.95
"""Of deadline_s: so long it is asked and waited, which leaves the rest for the answer to the trainer."""


class VlmScorer:
    """Asks a model for a number: score = (number - low) / (high - low), raw = the number itself.

    An answer that is cut off, refused, or without one clear number from low to high (`verdict_text` says what that is)
    is asked for again, and an error that shows it if that does not help: no score is made up. An endpoint that asks for
    time (429, or Retry-After) gets it, as far as deadline_s allows; that does not count as a try. Options:
        url             the endpoint up to /v1, or all of it up to /chat/completions
        model           the name that the endpoint knows the model by
        template        what is asked; {prompt} is replaced by the image's prompt
        pattern         regular expression with one group, the number, for a template that asks for something else than
                        "Score: NUMBER"; all its matches in an answer have to agree
        low, high       the scale that the template asks for
        timeout_s       seconds for one answer
        deadline_s      seconds for all answers of a batch; a trainer that starts the scorer gives its own deadline_s
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
        pattern: str = "",
        low: float = 0.0,
        high: float = 10.0,
        timeout_s: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        api_key_env: str = "",
        fields: str = FIELDS,
        deadline_s: float = 300.0,
    ) -> None:
        self._key = _api_key(api_key_env)
        self._url = _endpoint(url, bool(self._key))
        self._model = model
        self._template = template
        self._pattern = _compiled(pattern) if pattern else None
        self._low, self._high = low, high
        self._timeout_s, self._retries, self._concurrency = timeout_s, retries, concurrency
        self._deadline_s = deadline_s
        self._not_before = 0.0  # time.monotonic() until which the endpoint has asked not to be asked
        self._fields = _json_object(fields)
        self._opener = urllib.request.build_opener(NoRedirect)
        if "{prompt}" not in template:
            raise UsageError(f"the vlm scorer's template has no {{prompt}} to be replaced; found {template!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"the vlm scorer wants low < high, both finite; found low={low}, high={high}")
        if not (timeout_s > 0 and deadline_s > 0 and retries >= 0 and concurrency >= 1):
            raise UsageError(
                "the vlm scorer wants timeout_s > 0, deadline_s > 0, retries >= 0 and concurrency >= 1; found "
                f"timeout_s={timeout_s}, deadline_s={deadline_s}, retries={retries}, concurrency={concurrency}"
            )

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judges images u8[B,H,W,3] by their prompts; raw["vlm"] is the model's number, a reason its answer.

        Raises ValueError for images of another form, RuntimeError, naming the image, if no number can be had for one.
        """
        check_batch("vlm", images, prompts, metadata)
        stop, until = threading.Event(), time.monotonic() + DEADLINE_PART * self._deadline_s
        with futures.ThreadPoolExecutor(self._concurrency, thread_name_prefix="vlm") as pool:
            jobs = [pool.submit(self._judge, stop, until, *job) for job in zip(count(), images, prompts)]
            try:
                answers = [job.result() for job in jobs]
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        number = np.array([value for value, _ in answers], dtype=np.float32)
        score = (number - np.float32(self._low)) / np.float32(self._high - self._low)
        return Scores(score=score, raw={"vlm": number}, reasons=[text for _, text in answers])

    def _judge(
        self, stop: threading.Event, until: float, index: int, image: np.ndarray, prompt: str
    ) -> tuple[float, str]:
        """Return the number for one image and the answer that it stands in; stop ends the waiting between tries."""
        request = self._request(image, prompt)
        failures, turned_away = 0, 0
        while True:
            if stop.wait(max(self._not_before - time.monotonic(), 0.0)):
                raise futures.CancelledError
            try:
                text = self._ask(request, until)
                return self._number(text), text.strip()[:MAX_SHOWN]
            except BusyError as error:
                failure: Exception = error
                pause_s = error.retry_after_s or _backoff(turned_away)
                turned_away += 1
            except TransientError as error:
                failure, pause_s = error, _backoff(failures)
                failures += 1
            except RefusedError as error:
                raise RuntimeError(f"vlm: {self._url} refused image {index} (prompt {prompt!r}): {error}") from error
            tries = f"after {failures + turned_away} tries at {self._url}"
            if failures > self._retries:
                raise RuntimeError(f"vlm: no score for image {index} (prompt {prompt!r}) {tries}; the last: {failure}")
            left_s = until - time.monotonic()
            if pause_s >= left_s:
                raise RuntimeError(
                    f"vlm: no score for image {index} (prompt {prompt!r}) {tries}; the next try would come in "
                    f"{pause_s:.3g} s, and {max(left_s, 0):.3g} s are left of deadline_s={self._deadline_s:g}: allow "
                    f"more, or send fewer images at a time; the last: {failure}"
                )
            if isinstance(failure, BusyError):  # it is no use for the others either
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)
            if stop.wait(pause_s):
                raise futures.CancelledError

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

    def _ask(self, request: urllib.request.Request, until: float) -> str:
        """Return the text of one answer that is whole."""
        timeout_s = max(min(self._timeout_s, until - time.monotonic()), 0.001)
        deadline = time.monotonic() + timeout_s
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                body = read_body(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except TimeoutError:
            limit = f"timeout_s={self._timeout_s}" if timeout_s == self._timeout_s else f"{timeout_s:.3g} s"
            raise TransientError(f"no answer within {limit}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise TransientError(self._shown(f"{type(error).__name__}: {error}")) from None
        return self._text(body)

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP status means for the next try."""
        body = body_of(error)
        told = f"HTTP status {error.code} {self._shown(body)}"
        if error.code not in RETRIED or "insufficient_quota" in body:
            return RefusedError(told)
        retry_after_s = retry_after_of(error.headers)
        if error.code == 429 or retry_after_s:
            return BusyError(told, retry_after_s)
        return TransientError(told)

    def _text(self, body: bytes) -> str:
        """Return the text of an answer's body, if the answer is whole."""
        try:
            choices = json.loads(body)["choices"]
            choice, message = choices[0], choices[0]["message"]
            text, refusal, reason = message["content"], message.get("refusal"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text, refusal, reason = None, None, None
        if refusal:
            raise TransientError(f"the model refused to answer: {self._shown(str(refusal))}")
        if reason not in FINISHED:
            advice = "; raise max_tokens in the option fields" if reason == "length" else ""
            shown = self._shown(text if isinstance(text, str) else body.decode(errors="replace"))
            raise TransientError(f"the answer is not finished (finish_reason {reason!r}){advice}: {shown}")
        if not isinstance(text, str):
            shown = self._shown(body.decode(errors="replace"))
            raise TransientError(f"no text at choices[0].message.content of the answer {shown}")
        return text

    def _number(self, text: str) -> float:
        """Return the number in an answer."""
        matching = f" matching {self._pattern.pattern!r}" if self._pattern else ""
        expected = f"expected one number from {self._low} to {self._high}{matching}"
        try:
            number = read_verdict(text, self._high, self._pattern)
        except UnreadableError as error:
            raise TransientError(f"{expected}; {error}: the answer {self._shown(text)}") from None
        if not self._low <= number <= self._high:
            raise TransientError(f"{expected}; found {number:g} in the answer {self._shown(text)}")
        return number

    def _shown(self, text: str) -> str:
        """Return a text from outside for an error message: short, and without the key, which some servers repeat."""
        return repr((text.replace(self._key, "***") if self._key else text)[:MAX_SHOWN])


def _backoff(tried: int) -> float:
    return min(FIRST_BACKOFF_S * 2 ** min(tried, 30), MAX_BACKOFF_S)


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _endpoint(url: str, has_key: bool) -> str:
    """Return the address to post to; a key is not sent in the clear to another machine."""
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
    if not isinstance(found, dict) or found.keys() & set(TAKEN_FIELDS):
        names = ", ".join(TAKEN_FIELDS)
        raise UsageError(f"the vlm scorer's fields have to be a JSON object without {names}; found {text}")
    return found

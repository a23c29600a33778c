"""A vision-language model as a scorer, behind any OpenAI-compatible /v1/chat/completions endpoint."""

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
"""HTTP statuses that may be temporary."""
MAX_SHOWN = 500
"""Characters of an answer that are shown in an error or kept as a reason."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
FINISHED = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")
"""Values of finish_reason for a complete answer; some servers omit it."""
TAKEN_FIELDS = ("model", "messages", "stream", "n")
DEADLINE_PART = 0.95
"""The share of deadline_s spent on requests and waiting; the rest is left for replying to the trainer."""


class VlmScorer:
    """Asks a model for a number: score = (number - low) / (high - low), raw = the number itself.

    A request is repeated if the answer is truncated, a refusal, or without one clear number from low to high (defined
    in `verdict_text`); if that does not help, an error shows the answer, and no score is invented. If the endpoint asks
    to wait (429, or Retry-After), the scorer waits as long as deadline_s allows, without counting a retry. Options:
        url             the endpoint up to /v1, or the full URL up to /chat/completions
        model           the endpoint's name of the model
        template        the question; {prompt} is replaced by the image's prompt
        pattern         regular expression with one group, the number, for a template that does not ask for
                        "Score: NUMBER"; all its matches in an answer must agree
        low, high       the scale that the template asks for
        timeout_s       seconds for one answer
        deadline_s      seconds for all answers of a batch; a trainer that starts the scorer passes its own deadline_s
        retries         how often a failed or unreadable answer is requested again, after 0.5, 1, 2, ... 30 s
        concurrency     number of simultaneous requests, one per image
        api_key_env     environment variable with the API key, if the endpoint needs one
        fields          JSON object of additional request fields
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
        self._not_before = 0.0  # time.monotonic() before which the endpoint asked for no more requests
        self._fields = _json_object(fields)
        self._opener = urllib.request.build_opener(NoRedirect)
        if "{prompt}" not in template:
            raise UsageError(f"the vlm scorer's template has no {{prompt}} to be replaced; found {template!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"the vlm scorer needs low < high, both finite; found low={low}, high={high}")
        if not (timeout_s > 0 and deadline_s > 0 and retries >= 0 and concurrency >= 1):
            raise UsageError(
                "the vlm scorer needs timeout_s > 0, deadline_s > 0, retries >= 0 and concurrency >= 1; found "
                f"timeout_s={timeout_s}, deadline_s={deadline_s}, retries={retries}, concurrency={concurrency}"
            )

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] by their prompts; raw["vlm"] is the model's number, reasons are its answers.

        Raises ValueError for images of another form, and RuntimeError, naming the image, if one gets no number.
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
        """Return the number for one image and the answer that contains it; stop ends the pauses between tries."""
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
                    f"{pause_s:.3g} s, but {max(left_s, 0):.3g} s are left of deadline_s={self._deadline_s:g}: raise "
                    f"it, or send fewer images at a time; the last: {failure}"
                )
            if isinstance(failure, BusyError):  # the other images must wait as well
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
        """Return the text of one complete answer."""
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
        """Return the error for an HTTP status: refused, busy or temporary."""
        body = body_of(error)
        message = f"HTTP status {error.code} {self._shown(body)}"
        if error.code not in RETRIED or "insufficient_quota" in body:
            return RefusedError(message)
        retry_after_s = retry_after_of(error.headers)
        if error.code == 429 or retry_after_s:
            return BusyError(message, retry_after_s)
        return TransientError(message)

    def _text(self, body: bytes) -> str:
        """Return the text in the body of an answer; TransientError unless the answer is complete."""
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
        """Return an external text for an error message: shortened, and without the API key, which some servers echo."""
        return repr((text.replace(self._key, "***") if self._key else text)[:MAX_SHOWN])


def _backoff(tried: int) -> float:
    return min(FIRST_BACKOFF_S * 2 ** min(tried, 30), MAX_BACKOFF_S)


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _endpoint(url: str, has_key: bool) -> str:
    """Return the URL for requests; UsageError if an API key would be sent unencrypted to another machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"the vlm scorer's url must start with http:// or https:// and name a host; found {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "the vlm scorer's url contains a user, a password, a query or a fragment; leave them out, and set "
            "api_key_env to the environment variable with the API key"
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
            f"the vlm scorer's api_key_env names {variable}, which is not set in its process; export it first, "
            "or leave api_key_env out if the endpoint needs no key"
        )
    return key


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the vlm scorer's pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise UsageError(
            f"the vlm scorer's pattern needs exactly one group, the number; {pattern!r} has {compiled.groups} "
            "(write other groups as (?:...))"
        )
    return compiled


def _json_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the vlm scorer's fields are not JSON: {error}; found {text!r}") from error
    if not isinstance(fields, dict) or fields.keys() & set(TAKEN_FIELDS):
        names = ", ".join(TAKEN_FIELDS)
        raise UsageError(f"the vlm scorer's fields must be a JSON object without {names}; found {text}")
    return fields

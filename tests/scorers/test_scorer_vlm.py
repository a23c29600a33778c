"""Tests of the vlm scorer against a real HTTP server with a fake model: requests, answers and errors."""

import base64
import email.utils
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import load_scorer, vlm, with_defaults
from rewards_bridge.scorers.http_answers import retry_after_of
from rewards_bridge.scorers.vlm import VlmScorer

KEY = "sk-do-not-tell"


class Endpoint:
    """Answers POST requests with the result of `answer` for their JSON: a status and a body, or the model's text."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.headers = []
        self.lock = threading.Lock()
        self.together = self.most_together = 0
        self.url = ""

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
            self.together += 1
            self.most_together = max(self.most_together, self.together)
        try:
            response = self.answer(body)
        finally:
            with self.lock:
                self.together -= 1
        status, body, *headers = (200, reply(response)) if isinstance(response, str) else response
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        if status == 307:
            handler.send_header("Location", self.url + "/elsewhere")
        handler.end_headers()
        handler.wfile.write(body)


def reply(text, **more) -> bytes:
    """Return the body of an answer; more: finish_reason of the choice, other fields of the message."""
    finish = {"finish_reason": more.pop("finish_reason")} if "finish_reason" in more else {}
    return json.dumps({"choices": [{**finish, "message": {"role": "assistant", "content": text, **more}}]}).encode()


@contextmanager
def serving(answer) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                endpoint.handle(self)
            except OSError:  # the client did not wait
                self.close_connection = True

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def quick_and_direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(vlm, "FIRST_BACKOFF_S", 0.01)


def pictures(number: int) -> np.ndarray:
    """Return pictures, the b-th of which is (b, 0, 255 - b) everywhere."""
    images = np.zeros((number, 8, 6, 3), np.uint8)
    images[..., 0] = np.arange(number)[:, None, None]
    images[..., 2] = 255 - images[..., 0]
    return images


def seen(body: dict) -> tuple[str, np.ndarray]:
    """Return the text and the picture of a request."""
    text, image = body["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return text["text"], np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def prompts(number: int) -> list[str]:
    return [f"prompt {{{index}}}" for index in range(number)]


def test_every_picture_is_sent_with_its_prompt_and_order_is_kept():
    def answer(body):
        text, picture = seen(body)
        number = int(picture[0, 0, 0])
        assert (picture == pictures(number + 1)[number]).all(), "not the picture that was sent"
        assert text == f"rate prompt {{{number}}} 0-100"
        time.sleep(0.002 * (40 - number))  # the first request is answered last
        return f"I would say 55. Score: {number}"

    with serving(answer) as endpoint:
        scorer = VlmScorer(
            endpoint.url, "judge", template="rate {prompt} 0-100", high=100.0, concurrency=6, fields='{"seed": 3}'
        )
        scores = scorer.score(pictures(40), prompts(40), [{}] * 40)
    np.testing.assert_array_equal(scores.raw["vlm"], np.arange(40, dtype=np.float32))
    np.testing.assert_allclose(scores.score, np.arange(40) / 100, rtol=1e-6)
    assert scores.score.dtype == scores.raw["vlm"].dtype == np.float32
    assert scores.reasons == [f"I would say 55. Score: {number}" for number in range(40)]
    assert 1 < endpoint.most_together <= 6
    paths, bodies = zip(*endpoint.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert {(body["model"], body["seed"]) for body in bodies} == {("judge", 3)}
    assert not any("Authorization" in headers for headers in endpoint.headers)


def test_the_scale_is_mapped_to_one():
    answers = iter(["Score: -1", "Score: 0.5", "score = 1", "**Score:** -0.5", "Score: 0\n\nScore: 0"])
    with serving(lambda body: next(answers)) as endpoint:
        scorer = VlmScorer(endpoint.url + "/chat/completions", "judge", low=-1.0, high=1.0, concurrency=1)
        scores = scorer.score(pictures(5), prompts(5), [{}] * 5)
    assert scores.score.tolist() == [0.0, 0.75, 1.0, 0.25, 0.5]
    assert scores.raw["vlm"].tolist() == [-1.0, 0.5, 1.0, -0.5, 0.0]


BAD_BODIES = [
    (200, b"<html>"),
    (200, b"{}"),
    (200, json.dumps({"choices": []}).encode()),
    (200, reply(None)),
    (200, reply(["Score: 5"])),
    "I cannot judge that",
    "Score: 11",
    "Score: -1",
    "Score: 7-8",
    (200, reply("Score: 1", finish_reason="length")),
    (200, reply("Score: 0", finish_reason="content_filter")),
    (200, reply("Score: 0", refusal="I cannot judge people")),
    (500, b"out of memory"),
    (503, b"loading"),
    (429, b"slow down"),
]


@pytest.mark.parametrize("bad", BAD_BODIES, ids=lambda bad: str(bad)[:30])
def test_what_may_pass_is_tried_again(bad):
    answers = iter([bad, bad, "Score: 7"])
    with serving(lambda body: next(answers)) as endpoint:
        scores = VlmScorer(endpoint.url, "judge", retries=2).score(pictures(1), ["a cat"], [{}])
        assert len(endpoint.requests) == 3
    assert scores.raw["vlm"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("I cannot judge that", "no number that is clearly its score: the answer 'I cannot judge that'"),
        ("Score: 11", "from 0.0 to 10.0; found 11 in the answer 'Score: 11'"),
        ("Score: 4/5", "continues in another way: the answer 'Score: 4/5'"),
        (
            (200, reply("Score: 1", finish_reason="length")),
            r"not finished \(finish_reason 'length'\); raise max_tokens in the option fields: 'Score: 1'",
        ),
        ((200, reply(None, refusal="not people")), "the model refused to answer: 'not people'"),
        ((200, b"{}"), r"no text at choices\[0\].message.content of the answer '{}'"),
        ((500, b"out of memory"), "HTTP status 500 'out of memory'"),
    ],
)
def test_no_score_is_invented(bad, words):
    def answer(body):
        return bad if "prompt {2}" in seen(body)[0] else "Score: 5"

    with (
        serving(answer) as endpoint,
        pytest.raises(RuntimeError, match=r"image 2 \(prompt 'prompt \{2\}'\) after 3 tries.*" + words),
    ):
        VlmScorer(endpoint.url, "judge", retries=2).score(pictures(4), prompts(4), [{}] * 4)


def test_an_endpoint_that_asks_for_time_gets_it_and_no_try_is_counted():
    """Every refusal says how long to wait; the other pictures wait as well."""
    began = time.monotonic()
    begun = []

    def answer(body):
        begun.append(time.monotonic() - began)
        if len(begun) == 1:
            return (429, b"slow down", ("Retry-After", "1"))
        return (503, b"", ("retry-after-ms", "100")) if len(begun) < 4 else "Score: 5"

    with serving(answer) as endpoint:
        scorer = VlmScorer(endpoint.url, "judge", retries=0, concurrency=1)
        assert scorer.score(pictures(3), prompts(3), [{}] * 3).raw["vlm"].tolist() == [5.0] * 3
    assert len(begun) == 3 + 3
    assert begun[1] - begun[0] >= 1


def test_time_that_the_deadline_does_not_have_is_not_waited_for():
    with serving(lambda body: (429, b"slow down", ("Retry-After", "12"))) as endpoint:
        begun = time.monotonic()
        scorer = VlmScorer(endpoint.url, "judge", deadline_s=4.0)
        with pytest.raises(
            RuntimeError, match=r"would come in 12 s, but 3.* are left of deadline_s=4: .* 429 'slow down"
        ):
            scorer.score(pictures(3), prompts(3), [{}] * 3)
        assert time.monotonic() - begun < 3


def test_a_quota_that_is_used_up_is_not_waited_for():
    body = json.dumps({"error": {"code": "insufficient_quota"}}).encode()
    with (
        serving(lambda _: (429, body, ("Retry-After", "1"))) as endpoint,
        pytest.raises(RuntimeError, match=r"refused image 0 .*insufficient_quota"),
    ):
        VlmScorer(endpoint.url, "judge").score(pictures(1), ["a cat"], [{}])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("", 0.0), ("soon", 0.0), ("-3", 0.0), ("nan", 0.0), ("1e999", 0.0)],
)
def test_what_retry_after_says(text, seconds):
    headers = Message()
    headers["Retry-After"] = text
    assert retry_after_of(headers) == seconds
    headers = Message()
    headers["Retry-After"] = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 20 < retry_after_of(headers) <= 30


def test_a_trainer_passes_its_own_deadline_to_the_scorer():
    defaults = {"deadline_s": "40", "device": "cpu"}
    assert with_defaults("vlm", {"model": "m"}, defaults) == {"model": "m", "deadline_s": "40"}
    assert with_defaults("vlm", {"deadline_s": "9"}, defaults) == {"deadline_s": "9"}
    assert with_defaults("jpeg", {}, defaults) == {}


def test_a_refusal_is_not_tried_again_and_ends_the_batch():
    def answer(body):
        return (400, f"no images for {KEY} here".encode()) if "prompt {0}" in seen(body)[0] else (503, b"")

    with serving(answer) as endpoint:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"refused image 0 .*HTTP status 400 'no images for"):
            VlmScorer(endpoint.url, "judge", retries=40, concurrency=2).score(pictures(50), prompts(50), [{}] * 50)
        assert time.monotonic() - begun < 5
        assert len(endpoint.requests) < 20


def test_a_slow_answer_is_abandoned():
    stop = threading.Event()

    def answer(body):
        stop.wait(20)
        return "Score: 5"

    with serving(answer) as endpoint:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"image 0 .* after 2 tries.*(timed out|no answer within timeout_s=0.2)"):
            VlmScorer(endpoint.url, "judge", timeout_s=0.2, retries=1).score(pictures(1), ["a cat"], [{}])
        assert time.monotonic() - begun < 5
        stop.set()


def test_an_answer_that_trickles_in_is_abandoned():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
                time.sleep(0.05)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        begun = time.monotonic()
        scorer = VlmScorer(f"http://127.0.0.1:{server.server_port}", "judge", timeout_s=0.3, retries=0)
        with pytest.raises(RuntimeError, match=r"no answer within timeout_s=0.3"):
            scorer.score(pictures(1), ["a cat"], [{}])
        assert time.monotonic() - begun < 3
        server.shutdown()


def test_nobody_there_is_an_error():
    with pytest.raises(RuntimeError, match=r"image 0 .* after 2 tries.*refused"):
        VlmScorer("http://127.0.0.1:9/v1", "judge", retries=1).score(pictures(1), ["a cat"], [{}])


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with serving(lambda body: (401, f"wrong key {KEY}".encode())) as endpoint:
        scorer = load_scorer(
            "rewards_bridge.scorers.vlm:VlmScorer",
            {"url": endpoint.url, "model": "judge", "api_key_env": "JUDGE_KEY", "high": "5", "retries": "0"},
        )
        with pytest.raises(RuntimeError, match=r"HTTP status 401 'wrong key \*\*\*'") as caught:
            scorer.score(pictures(1), ["a cat"], [{}])
        assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    texts = [str(caught.value), str(caught.value.__cause__), str(caught.value.__context__), repr(scorer)]
    assert not any(KEY in text for text in texts)


def test_the_key_is_not_carried_to_another_address(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda body: (307, b"moved")) as endpoint:
        scorer = VlmScorer(endpoint.url, "judge", api_key_env="JUDGE_KEY")
        with pytest.raises(RuntimeError, match="HTTP status 307 'moved'"):
            scorer.score(pictures(1), ["a cat"], [{}])
        assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "ftp://host/v1"}, "http:// or https://"),
        ({"url": "judge:8000/v1"}, "http:// or https://"),
        ({"url": "http:///v1"}, "name a host"),
        ({"url": "https://user:secret@host/v1"}, "leave them out"),
        ({"url": "https://host/v1?key=secret"}, "leave them out"),
        ({"url": "http://host.example/v1", "api_key_env": "JUDGE_KEY"}, "unencrypted to host.example"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY, which is not set"),
        ({"template": "rate it"}, "no {prompt}"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": r"\d+"}, "exactly one group, the number; .* has 0"),
        ({"pattern": r"(a|b)(\d+)"}, "has 2"),
        ({"low": "1", "high": "1"}, "low < high"),
        ({"high": "nan"}, "high='nan' is not a valid"),
        ({"timeout_s": "0"}, "timeout_s > 0"),
        ({"deadline_s": "-1"}, "deadline_s > 0"),
        ({"fields": '{"stream": true}'}, "without model, messages, stream, n"),
        ({"retries": "-1"}, "retries >= 0"),
        ({"concurrency": "0"}, "concurrency >= 1"),
        ({"fields": "{"}, "not JSON"),
        ({"fields": "[]"}, "JSON object"),
        ({"fields": '{"model": "other"}'}, "without model"),
    ],
)
def test_options_that_cannot_work(options, words, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(UsageError, match=words) as caught:
        load_scorer("rewards_bridge.scorers.vlm:VlmScorer", {"url": "https://host/v1", "model": "judge", **options})
    assert "secret" not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), r"uint8\[B, H, W, 3\].* found float32\[1, 8, 8, 3\]"),
        (np.zeros((1, 8, 8), np.uint8), r"found uint8\[1, 8, 8\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), "2 images, 1 prompts"),
    ],
)
def test_images_of_another_form(images, words):
    with pytest.raises(ValueError, match=words):
        VlmScorer("https://host/v1", "judge").score(images, ["a cat"], [{}])

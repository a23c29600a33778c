"""The guard of the demo page: foreign origins and host names, files, oversized requests, and repeated logins."""

import asyncio
from typing import Any

import pytest

from scripts.demo_guard import MAX_BODY_BYTES, MAX_DELAY_S, MAX_WAITING, Guard

HOST = (b"host", b"127.0.0.1:7860")


def call(guard: Guard, path: str = "/", method: str = "POST", *headers: tuple[bytes, bytes], body: bytes = b"") -> int:
    return asyncio.run(called(guard, path, method, headers or (HOST,), body))


async def called(guard: Guard, path: str, method: str, headers: Any, body: bytes = b"") -> int:
    scope = {"type": "http", "path": path, "method": method, "headers": headers, "client": ("192.0.2.7", 1)}
    statuses = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await guard(scope, receive, send)
    return statuses[0]


async def page(scope: Any, receive: Any, send: Any) -> None:
    """Answer 200, but 400 to a login with another body than "right", and 499 to a request that is cut off."""
    message = await receive()
    status = 499 if message["type"] == "http.disconnect" else 200
    if scope["path"] == "/login" and message.get("body") != b"right":
        status = 400
    await send({"type": "http.response.start", "status": status, "headers": []})


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/", "GET", [HOST], 200),
        ("/gradio_api/queue/join", "POST", [HOST, (b"origin", b"http://127.0.0.1:7860")], 200),
        ("/", "GET", [(b"host", b"localhost:7860")], 200),
        ("/", "GET", [(b"host", b"[::1]:7860")], 200),
        ("/", "GET", [(b"host", b"evil.example:7860")], 403),
        ("/", "GET", [(b"host", b"")], 403),
        ("/gradio_api/queue/join", "POST", [HOST, (b"origin", b"https://evil.example")], 403),
        ("/gradio_api/queue/join", "POST", [HOST, (b"origin", b"null")], 403),
        ("/gradio_api/queue/join", "POST", [HOST, (b"sec-fetch-site", b"cross-site")], 403),
        ("/gradio_api/upload", "POST", [HOST], 403),
        ("/gradio_api/upload_progress", "GET", [HOST], 403),
        ("/", "POST", [HOST, (b"content-length", str(MAX_BODY_BYTES + 1).encode())], 413),
        ("/", "POST", [HOST, (b"content-length", b"many")], 413),
    ],
)
def test_what_is_let_in(path: str, method: str, headers: list, status: int) -> None:
    assert call(Guard(page, only_local=True), path, method, *headers) == status


def test_a_page_with_passwords_has_any_name_and_bodies_without_a_length_are_cut() -> None:
    guard = Guard(page, only_local=False)
    assert call(guard, "/", "GET", (b"host", b"demo.example")) == 200
    assert call(guard, body=b"x" * (MAX_BODY_BYTES + 1)) == 499


def test_failed_logins_slow_down_the_next_and_a_right_one_ends_that() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    guard = Guard(page, only_local=True, sleep=sleep)
    assert [call(guard, "/login", body=b"wrong") for _ in range(8)] == [400] * 8
    assert slept == [0.5, 1, 2, 4, 8, MAX_DELAY_S, MAX_DELAY_S]
    assert call(guard, "/login", body=b"right") == 200
    assert call(guard, "/login", body=b"right") == 200
    assert len(slept) == 8


def test_many_logins_at_a_time_are_refused() -> None:
    async def together() -> list[int]:
        guard = Guard(page, only_local=True, sleep=lambda seconds: asyncio.sleep(0.01))
        return await asyncio.gather(
            *(called(guard, "/login", "POST", [HOST], b"wrong") for _ in range(MAX_WAITING + 3))
        )

    assert sorted(asyncio.run(together())) == [400] * (MAX_WAITING + 1) + [429] * 2  # the first did not have to wait

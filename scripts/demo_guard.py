"""ASGI middleware of the demo page: refuse foreign origins, uploads and oversized requests, and slow down logins."""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]

MAX_BODY_BYTES = 256 << 10
"""Size of a request; the page itself sends a prompt of at most 2000 characters and a few numbers."""
MAX_CALLERS = 1024
"""Addresses whose failed logins are remembered."""
MAX_WAITING = 4
"""Concurrent logins of one address."""
MAX_DELAY_S = 8.0
"""Delay of a login after repeated failures."""


class _Caller:
    """The state of one address's logins."""

    def __init__(self) -> None:
        self.failures = 0
        self.waiting = 0
        self.turn = asyncio.Lock()


class Guard:
    """Guards the page's ASGI app.

    only_local: whether requests must name this machine as their host, so that a foreign domain that resolves to it (DNS
    rebinding) cannot open a page without passwords. sleep: the function that delays logins.
    """

    def __init__(self, app: App, only_local: bool, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._app = app
        self._only_local = only_local
        self._sleep = sleep
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await _refuse(scope, send, *refusal)
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/login"):
            await self._login(scope, receive, send)
        else:
            await self._app(scope, _bounded(receive), send)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if self._only_local and not _is_local(host):
            return 403, f"open this page as localhost or 127.0.0.1, not as {host[:100]}"
        if origin and origin.partition("://")[2] != host:
            return 403, "cross-site requests are refused"
        if headers.get("sec-fetch-site") == "cross-site" and scope.get("method", "GET") not in ("GET", "HEAD"):
            return 403, "cross-site requests are refused"
        if scope["path"].rstrip("/").rpartition("/")[2] in ("upload", "upload_progress"):
            return 403, "this page accepts no files"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return 413, f"a request may have at most {MAX_BODY_BYTES} bytes"
        return None

    async def _login(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass an address's logins on one after another; each failure doubles the delay of the next."""
        caller = self._caller(str((scope.get("client") or ("",))[0]))
        if caller.waiting >= MAX_WAITING:
            await _refuse(scope, send, 429, "too many concurrent logins; try again later")
            return

        async def count_failures(message: Any) -> None:
            if message["type"] == "http.response.start":
                caller.failures = caller.failures + 1 if message["status"] >= 400 else 0
            await send(message)

        caller.waiting += 1
        try:
            async with caller.turn:
                if caller.failures:
                    await self._sleep(min(MAX_DELAY_S, 0.25 * 2 ** min(caller.failures, 10)))
                await self._app(scope, _bounded(receive), count_failures)
        finally:
            caller.waiting -= 1

    def _caller(self, address: str) -> _Caller:
        caller = self._callers.pop(address, None) or _Caller()
        self._callers[address] = caller
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        return caller


def _is_local(host: str) -> bool:
    """Return whether a Host header names the loopback interface."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _bounded(receive: Any) -> Any:
    """Wrap `receive` so that a request of more than MAX_BODY_BYTES in total reads as a lost connection."""
    total = 0

    async def bounded() -> Any:
        nonlocal total
        message = await receive()
        total += len(message.get("body") or b"")
        return message if total <= MAX_BODY_BYTES else {"type": "http.disconnect"}

    return bounded


async def _refuse(scope: Any, send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

"""What stands before the demo page: foreign pages, uploads and huge requests are refused, logins are slowed down."""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]

MAX_BODY_BYTES = 256 << 10
"""Bytes of a request; the page itself sends a prompt of at most 2000 characters and a few numbers."""
MAX_CALLERS = 1024
"""Addresses whose failed logins are remembered."""
MAX_WAITING = 4
"""Logins of one address at a time."""
MAX_DELAY_S = 8.0


class _Caller:
    """The logins of one address."""

    def __init__(self) -> None:
        self.failures = 0
        self.waiting = 0
        self.turn = asyncio.Lock()


class Guard:
    """Wraps the page's ASGI app.

    only_local: whether requests have to name this machine as their host, so that no foreign name that somebody points
    at it (DNS rebinding) opens a page without passwords. sleep: what delays logins.
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
            return 403, f"this page is reached as localhost or 127.0.0.1, not as {host[:100]}"
        if origin and origin.partition("://")[2] != host:
            return 403, "requests of pages from elsewhere are refused"
        if headers.get("sec-fetch-site") == "cross-site" and scope.get("method", "GET") not in ("GET", "HEAD"):
            return 403, "requests of pages from elsewhere are refused"
        if scope["path"].rstrip("/").rpartition("/")[2] in ("upload", "upload_progress"):
            return 403, "this page takes no files"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return 413, f"a request has at most {MAX_BODY_BYTES} bytes"
        return None

    async def _login(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the logins of an address in one after another, each failure doubling the time before the next."""
        caller = self._caller(str((scope.get("client") or ("",))[0]))
        if caller.waiting >= MAX_WAITING:
            await _refuse(scope, send, 429, "too many logins at a time; wait a little")
            return

        async def look(message: Any) -> None:
            if message["type"] == "http.response.start":
                caller.failures = caller.failures + 1 if message["status"] >= 400 else 0
            await send(message)

        caller.waiting += 1
        try:
            async with caller.turn:
                if caller.failures:
                    await self._sleep(min(MAX_DELAY_S, 0.25 * 2 ** min(caller.failures, 10)))
                await self._app(scope, _bounded(receive), look)
        finally:
            caller.waiting -= 1

    def _caller(self, address: str) -> _Caller:
        caller = self._callers.pop(address, None) or _Caller()
        self._callers[address] = caller
        if len(self._callers) > MAX_CALLERS:
            self._callers.popitem(last=False)
        return caller


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine as seen from itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _bounded(receive: Any) -> Any:
    """Receive messages until they are larger together than a request may be; then the connection counts as lost."""
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

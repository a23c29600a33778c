"""Decide who may call the server and how long a call may be silent, before reading anything of the call.

Python's gRPC server uses a thread for every call. A call that sends nothing must not keep it.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from rewards_bridge import transport

FIRST_MESSAGE_S = 20.0
NEXT_MESSAGE_S = 60.0
"""How long a call may take to send its first message, and each further one (at most 2 MiB from our own client)."""
_LOOK_S = 0.5


class Patience:
    """Cancels calls that do not send their next message in time."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, grpc.ServicerContext]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="patience", daemon=True).start()

    def messages(self, stream: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Yield the messages of a call; grpc.RpcError if the next one is late or the client disconnects."""
        with self._limit(context, FIRST_MESSAGE_S):
            message = next(stream, None)
        while message is not None:
            yield message
            with self._limit(context, NEXT_MESSAGE_S):
                message = next(stream, None)

    @contextmanager
    def _limit(self, context: grpc.ServicerContext, seconds: float) -> Iterator[None]:
        with self._lock:
            self._waiting[id(context)] = (time.monotonic() + seconds, context)
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(id(context), None)

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            with self._lock:
                late = [context for due, context in self._waiting.values() if due < now]
            for context in late:
                context.cancel()


class Guard(grpc.ServerInterceptor):
    """Refuses every call without the token, if one is set, and limits how long the others may be silent."""

    def __init__(self, token: str | None, patience: Patience) -> None:
        self._expected = f"Bearer {token}".encode() if token else None
        self._patience = patience
        # A stream handler, so that the refusal does not wait for a message.
        self._refusal = grpc.stream_unary_rpc_method_handler(_refuse)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the handler of this call: its own method, with time limits, or a refusal."""
        if self._expected is not None and not self._knows_token(handler_call_details):
            return self._refusal
        handler = continuation(handler_call_details)
        if handler is None or handler.response_streaming:  # such as Health.Watch, which would block a thread forever
            return None
        return self._limited(handler)

    def _knows_token(self, details: grpc.HandlerCallDetails) -> bool:
        for key, value in details.invocation_metadata:
            token = value if isinstance(value, bytes) else value.encode()
            if key == transport.TOKEN_KEY and hmac.compare_digest(token, self._expected or b""):
                return True
        return False

    def _limited(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        def call(stream: Iterator[Any], context: grpc.ServicerContext) -> Any:
            messages = self._patience.messages(stream, context)
            if handler.stream_unary is not None:
                return handler.stream_unary(messages, context)
            message = next(messages, None)
            if message is None:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
            return handler.unary_unary(message, context)

        return grpc.stream_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


def _refuse(stream: Iterator[bytes], context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "this server requires a token; the call has none or a wrong one")

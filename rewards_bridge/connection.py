"""One gRPC channel to one server: health check, description, prompt checks and scoring."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rewards_bridge import transport
from rewards_bridge.errors import BridgeError
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.redaction import redacted

_HEALTH_TIMEOUT_S = 1.0
_HEALTH_PAUSE_S = 0.05
_DESCRIBE_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = messages.MAX_DEADLINE_S - 60.0  # a margin, since clocks differ; _wait enforces deadline_s itself
_NOT_YET = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 5.0
"""Between calls to a server that is too busy to accept another one."""


class StuckError(Exception):
    """The server finished nothing for too long while a call was waiting."""


class Connection:
    """A channel and the token that is sent with every call."""

    def __init__(self, address: str, tls_ca: str | None = None, token_file: str | None = None) -> None:
        self.address = address
        self._answered = 0.0  # time.monotonic() of the last sign that the server makes progress
        # No forked child uses gRPC here; without this setting it would log a message at every fork of the trainer.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        self._metadata = transport.call_metadata(transport.read_token(token_file) if token_file else None)
        if tls_ca:
            credentials = transport.channel_credentials(tls_ca)
            self._channel = grpc.secure_channel(address, credentials, options=transport.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(address, options=transport.CHANNEL_OPTIONS)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._describe = self._channel.unary_unary(
            messages.DESCRIBE_METHOD,
            request_serializer=bridge_pb2.DescribeRequest.SerializeToString,
            response_deserializer=bridge_pb2.DescribeReply.FromString,
        )
        self._check = self._channel.unary_unary(
            messages.CHECK_METHOD,
            request_serializer=bridge_pb2.CheckRequest.SerializeToString,
            response_deserializer=bridge_pb2.CheckReply.FromString,
        )
        self._score = self._channel.stream_unary(
            messages.SCORE_METHOD,
            request_serializer=bytes,  # the messages are encoded already
            response_deserializer=bridge_pb2.ScoreReply.FromString,
        )

    def wait_until_serving(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Return once the server is healthy; BridgeError after timeout_s, or any error of check between attempts."""
        end = time.monotonic() + timeout_s
        status = "no answer"
        while time.monotonic() < end:
            check()
            try:
                reply = self._health.Check(
                    health_pb2.HealthCheckRequest(service=messages.SERVICE),
                    timeout=_HEALTH_TIMEOUT_S,
                    metadata=self._metadata,
                )
            except grpc.RpcError as error:
                if error.code() not in _NOT_YET:
                    raise BridgeError(f"{self.address} is not a usable scorer server: {status_text(error)}") from error
                status = status_text(error)
            else:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                status = f"health {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}"
            time.sleep(_HEALTH_PAUSE_S)
        raise BridgeError(f"the scorer server at {self.address} was not serving after {timeout_s:g} s: {status}")

    def describe(self, scorer: str, timeout_s: float = _DESCRIBE_TIMEOUT_S) -> bridge_pb2.DescribeReply:
        """Return the server's description; BridgeError unless it speaks our version and serves this scorer.

        timeout_s: how long to retry while the server is busy or cannot be reached.
        """
        request = bridge_pb2.DescribeRequest(protocol_version=messages.PROTOCOL_VERSION)
        end = time.monotonic() + timeout_s
        while True:
            try:
                reply: bridge_pb2.DescribeReply = self._describe(
                    request, timeout=_DESCRIBE_TIMEOUT_S, metadata=self._metadata
                )
                messages.check_version(reply.protocol_version, f"the scorer server at {self.address}", "this client")
                break
            except grpc.RpcError as error:
                if error.code() not in _NOT_YET or time.monotonic() > end:
                    raise BridgeError(f"{self.address} is not a usable scorer server: {status_text(error)}") from error
            except messages.VersionError as error:
                raise BridgeError(str(error)) from error
            time.sleep(_HEALTH_PAUSE_S)
        if reply.scorer != scorer:
            raise BridgeError(
                f"the server at {self.address} serves scorer {reply.scorer!r}, but {scorer!r} is configured; change one"
            )
        return reply

    def check(self, request: bridge_pb2.CheckRequest, deadline_s: float) -> bridge_pb2.CheckReply:
        """Return the problems, and the notes if requested, of prompts by index; raises as `score` does."""
        return self._wait(
            lambda: self._check.future(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata), deadline_s
        )

    def score(self, stream: Callable[[], Iterable[bytes]], deadline_s: float) -> bridge_pb2.ScoreReply:
        """Send one batch, created anew by stream() for every attempt, and wait for the reply.

        A busy server is called again later. Raises StuckError once the server has finished nothing, for any client,
        for deadline_s; otherwise grpc.RpcError, or BridgeError if the connection is closed.
        """
        return self._wait(
            lambda: self._score.future(iter(stream()), timeout=_CALL_TIMEOUT_S, metadata=self._metadata),
            deadline_s,
        )

    def _wait(self, start: Callable[[], Any], deadline_s: float) -> Any:
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return self._result(start(), began, deadline_s)
            except (ValueError, grpc.FutureCancelledError) as error:  # what grpc raises for a closed channel
                raise BridgeError(f"the connection to {self.address} is closed") from error
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or "larger than max" in str(error.details()):
                    raise
            if self._left_s(began, deadline_s) <= 0:
                raise StuckError
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _result(self, call: Any, began: float, deadline_s: float) -> Any:
        """Return the result of a call; cancel it and raise StuckError once the server makes no progress."""
        timeout_s = max(max(began, self._answered) + deadline_s - time.monotonic(), 0.0)
        while True:
            try:
                reply = call.result(timeout=timeout_s)
            except grpc.FutureTimeoutError:
                timeout_s = self._left_s(began, deadline_s)
                if timeout_s <= 0:
                    call.cancel()
                    raise StuckError from None
            else:
                self._answered = time.monotonic()
                return reply

    def _left_s(self, began: float, deadline_s: float) -> float:
        """Return the seconds that the server may still take; query its progress first if they seem used up."""
        left_s = max(began, self._answered) + deadline_s - time.monotonic()
        if left_s > 0:
            return left_s
        try:
            request = bridge_pb2.DescribeRequest(protocol_version=messages.PROTOCOL_VERSION)
            timeout_s = min(_DESCRIBE_TIMEOUT_S, deadline_s)
            reply = self._describe(request, timeout=timeout_s, metadata=self._metadata)
        except (grpc.RpcError, ValueError):
            return 0.0
        if not reply.HasField("seconds_without_progress"):
            return 0.0
        self._answered = time.monotonic() - reply.seconds_without_progress
        return deadline_s - float(reply.seconds_without_progress)

    def close(self) -> None:
        """Cancel all calls and close the channel."""
        self._channel.close()


def status_text(error: grpc.RpcError) -> str:
    """Return a status as text: its code and its details."""
    return redacted(f"{error.code().name}: {error.details()}")

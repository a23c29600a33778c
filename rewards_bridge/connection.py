"""One gRPC channel to one server: is it up, is it the right one, score this."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rewards_bridge import transport
from rewards_bridge.errors import BridgeError
from rewards_bridge.protocol import bridge_pb2, messages

_HEALTH_TIMEOUT_S = 1.0
_HEALTH_PAUSE_S = 0.05
_NOT_YET = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Connection:
    """A channel, with the token that goes along with every call."""

    def __init__(self, address: str, tls_ca: str | None = None, token_file: str | None = None) -> None:
        self.address = address
        # gRPC is used in no forked child here; without this it says so at every fork of the trainer, whatever for.
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
            request_serializer=bytes,  # they are encoded already
            response_deserializer=bridge_pb2.ScoreReply.FromString,
        )

    def wait_until_serving(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Return once the server is healthy; BridgeError after timeout_s, or whatever check raises between attempts."""
        end = time.monotonic() + timeout_s
        found = "no answer"
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
                    raise BridgeError(f"{self.address} is no usable scorer server: {status_text(error)}") from error
                found = status_text(error)
            else:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                found = f"health {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}"
            time.sleep(_HEALTH_PAUSE_S)
        raise BridgeError(f"the scorer server at {self.address} was not serving after {timeout_s:g} s: {found}")

    def describe(self, scorer: str) -> bridge_pb2.DescribeReply:
        """Return what the server says of itself; BridgeError unless it speaks our version and holds this scorer."""
        request = bridge_pb2.DescribeRequest(protocol_version=messages.PROTOCOL_VERSION)
        try:
            reply: bridge_pb2.DescribeReply = self._describe(request, timeout=10.0, metadata=self._metadata)
            messages.check_version(reply.protocol_version, f"the scorer server at {self.address}", "this client")
        except grpc.RpcError as error:
            raise BridgeError(f"{self.address} is no usable scorer server: {status_text(error)}") from error
        except messages.VersionError as error:
            raise BridgeError(str(error)) from error
        if reply.scorer != scorer:
            raise BridgeError(
                f"the server at {self.address} holds scorer {reply.scorer!r}, the config wants {scorer!r}; change one"
            )
        return reply

    def check(self, request: bridge_pb2.CheckRequest, deadline_s: float) -> dict[int, str]:
        """Problem by index of the prompts that the scorer cannot score; grpc.RpcError if the call fails."""
        reply = self._check(request, timeout=deadline_s, metadata=self._metadata)
        return dict(reply.problems)

    def score(self, stream: Iterable[bytes], deadline_s: float) -> bridge_pb2.ScoreReply:
        """Send one batch and wait for its reply; grpc.RpcError otherwise."""
        try:
            reply: bridge_pb2.ScoreReply = self._score(iter(stream), timeout=deadline_s, metadata=self._metadata)
        except ValueError as error:  # what grpc says of a channel that was closed
            raise BridgeError(f"the connection to {self.address} is closed") from error
        return reply

    def close(self) -> None:
        """Cancel what is under way and forget the channel."""
        self._channel.close()


def status_text(error: grpc.RpcError) -> str:
    """A status as text: its code and what the other side said."""
    return f"{error.code().name}: {error.details()}"

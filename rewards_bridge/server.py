"""The scorer process: one scorer, loaded once, that scores one batch at a time while the next ones arrive."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rewards_bridge import doctor, lifeline, transport
from rewards_bridge.answers import AnswerError, encode_reply
from rewards_bridge.errors import PromptError, UsageError
from rewards_bridge.guard import Guard, Patience
from rewards_bridge.listening import bind, remove_socket
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.redaction import redacted, shown
from rewards_bridge.room import Room
from rewards_bridge.scorers import Scorer, Scores, default_options, load_scorer, with_defaults

MAX_SCORE_CALLS = 64  # batches and checks at once; further callers must call again later
MAX_CALLS = MAX_SCORE_CALLS + 16  # so that there is always room for health checks and descriptions
MAX_HELD_BYTES = 1 << 30  # of pixels in memory at once; senders of more wait
STOP_GRACE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class ServeConfig:
    """Arguments of serve: addresses are unix:/path or HOST:PORT (port 0: any free port); files are PEM."""

    scorer: str
    listen: str
    options: dict[str, str] = field(default_factory=dict)
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    exit_with_parent: bool = False
    device: str | None = None
    memory_fraction: float | None = None
    deadline_s: float | None = None
    """Seconds that clients wait for a batch, passed to scorers that have an option of this name."""

    def __post_init__(self) -> None:
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise UsageError(f"--memory-fraction is {self.memory_fraction}; expected more than 0 and at most 1")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("--tls-cert and --tls-key belong together; one of them is missing")
        if not transport.is_local(self.listen) and not (self.tls_cert and self.token_file):
            raise UsageError(
                f"refusing to listen on {self.listen}, which other machines can reach, without --tls-cert, --tls-key "
                "and --token-file; give all three, or listen on 127.0.0.1 or a unix socket"
            )


class _Bridge:
    """Implements the calls of bridge.proto."""

    def __init__(self, scorer: Scorer, description: bridge_pb2.DescribeReply) -> None:
        self._scorer = scorer
        self._description = description
        self._worker = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self._held = Room(MAX_HELD_BYTES)
        self._calls = threading.BoundedSemaphore(MAX_SCORE_CALLS)
        self._began: float | None = None  # start time of the current job
        self._progress = time.monotonic()  # when something was last received or finished

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            messages.SERVICE,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(
                    self.describe, response_serializer=bridge_pb2.DescribeReply.SerializeToString
                ),
                "Check": grpc.unary_unary_rpc_method_handler(
                    self.check, response_serializer=bridge_pb2.CheckReply.SerializeToString
                ),
                "Score": grpc.stream_unary_rpc_method_handler(
                    self.score, response_serializer=bridge_pb2.ScoreReply.SerializeToString
                ),
            },
        )

    def describe(self, message: bytes, context: grpc.ServicerContext) -> bridge_pb2.DescribeReply:
        """Return our version, scorer and setup, whatever the caller's version; the caller compares them."""
        try:
            bridge_pb2.DescribeRequest.FromString(message)
        except DecodeError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a DescribeRequest: {error}")
        reply = bridge_pb2.DescribeReply()
        reply.CopyFrom(self._description)
        began = self._began
        reply.seconds_without_progress = time.monotonic() - (self._progress if began is None else began)
        return reply

    def check(self, message: bytes, context: grpc.ServicerContext) -> bridge_pb2.CheckReply:
        """Return the scorer's problems with these prompts, and its notes if they are requested."""
        with _errors_as_status(context), self._place(context):
            prompts, metadata, with_notes = messages.decode_check(message)
            reply = bridge_pb2.CheckReply(problems=self._in_turn(context, self._remarks, "problem", prompts, metadata))
            if with_notes:
                reply.notes.update(self._in_turn(context, self._remarks, "note", prompts, metadata))
            return reply

    def _in_turn(self, context: grpc.ServicerContext, work: Callable[..., T], *arguments: Any) -> T:
        """Return the result of work(*arguments), run after all earlier jobs."""

        def timed() -> T:
            self._began = time.monotonic()
            try:
                return work(*arguments)
            finally:
                self._began, self._progress = None, time.monotonic()

        job = self._worker.submit(timed)
        _cancel_with_call(job, context)
        return job.result()

    def _remarks(self, method: str, prompts: list[str], metadata: list[dict]) -> dict[int, str]:
        """Return, by index, the non-empty texts of the scorer's optional method `problem` or `note`."""
        remark = getattr(self._scorer, method, None)
        if remark is None:
            return {}
        try:
            texts = [remark(prompt, item) for prompt, item in zip(prompts, metadata, strict=True)]
        except BaseException as error:
            raise _ScorerRaisedError(traceback.format_exc()) from error
        return {index: redacted(text) for index, text in enumerate(texts) if text}

    def score(self, stream: Iterator[bytes], context: grpc.ServicerContext) -> bridge_pb2.ScoreReply:
        """Receive one batch, wait for its turn and score it; every error becomes a status."""
        with _errors_as_status(context), self._place(context):
            started = time.monotonic()
            first = next(stream, None)
            if first is None:
                raise messages.MalformedError("a batch must start with a header; the stream was empty")
            header = messages.decode_header(first)
            with self._room_for_a_batch(header.pixel_bytes, context):
                batch = messages.decode_batch(header, stream)
                self._progress = received = time.monotonic()
                reply, began, ended = self._in_turn(context, self._answer, header.batch_id, batch)
            reply.seconds_receiving = received - started
            reply.seconds_queued = began - received
            reply.seconds_scoring = ended - began
            return reply

    def _answer(self, batch_id: int, batch: messages.Batch) -> tuple[bridge_pb2.ScoreReply, float, float]:
        scores, began, ended = self._score(batch)
        try:
            reply = encode_reply(batch_id, scores)
            for texts in (reply.reasons, reply.details):
                texts[:] = [redacted(text) for text in texts]
            return reply, began, ended
        except AnswerError as error:
            raise _ScorerRaisedError(f"its return value cannot be used: {error}") from error
        except Exception as error:  # e.g. from a tensor that cannot be copied to the CPU
            raise _ScorerRaisedError(traceback.format_exc()) from error

    def _score(self, batch: messages.Batch) -> tuple[Scores, float, float]:
        began = time.monotonic()
        try:
            scores = self._scorer.score(batch.images, batch.prompts, batch.metadata)
        except PromptError as error:
            raise _ScorerRaisedError(str(error)) from error  # its text needs no traceback
        except BaseException as error:
            raise _ScorerRaisedError(traceback.format_exc()) from error
        return scores, began, time.monotonic()

    @contextmanager
    def _place(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Occupy one of the places for scorer calls; if none is free, refuse the call before reading anything of it."""
        seconds = context.time_remaining()
        if seconds is None or seconds > messages.MAX_DEADLINE_S:
            raise messages.MalformedError(
                f"a call needs a deadline of at most {messages.MAX_DEADLINE_S} s, or it could hold its place forever"
            )
        if not self._calls.acquire(blocking=False):
            raise _BusyError(f"{MAX_SCORE_CALLS} calls are already waiting here; call again later")
        try:
            yield
        finally:
            self._calls.release()

    @contextmanager
    def _room_for_a_batch(self, size: int, context: grpc.ServicerContext) -> Iterator[None]:
        if not self._held.enter(size, is_over=lambda: not context.is_active()):
            raise futures.CancelledError  # its deadline passed, or the client disconnected
        try:
            yield
        finally:
            self._held.leave(size)

    def finish(self) -> bool:
        """Accept no more batches; return whether the current one finished within the grace period."""
        last = self._worker.submit(lambda: None)
        done, _ = futures.wait([last], timeout=STOP_GRACE_S)
        self._worker.shutdown(wait=False, cancel_futures=True)
        return last in done


def _cancel_with_call(job: futures.Future, context: grpc.ServicerContext) -> None:
    """Cancel the job if the client disconnects before its turn."""

    def cancel() -> None:
        job.cancel()

    if not context.add_callback(cancel):
        cancel()


class _ScorerRaisedError(Exception):
    """Carries the traceback of a scorer, or what is wrong with its return value, without secrets."""

    def __init__(self, text: str) -> None:
        super().__init__(redacted(text))


class _BusyError(Exception):
    """The server has no free place for this call."""


@contextmanager
def _errors_as_status(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except messages.VersionError as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except messages.MalformedError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except _ScorerRaisedError as error:
        # ABORTED, because the gRPC library itself never uses it
        context.abort(grpc.StatusCode.ABORTED, transport.shorten(str(error)))
    except (_BusyError, MemoryError) as error:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error) or "no memory is left for this batch")
    except (futures.CancelledError, grpc.RpcError):
        seconds = context.time_remaining()
        if seconds is not None and seconds <= 0:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the batch was scored")
        context.abort(grpc.StatusCode.CANCELLED, "the client disconnected")
    except Exception:  # a bug of ours; like an error of the scorer, it would recur
        context.abort(grpc.StatusCode.ABORTED, transport.shorten(traceback.format_exc()))


def serve(config: ServeConfig) -> int:
    """Load the scorer, serve it until SIGTERM, SIGINT or the end of the parent, and return the exit status."""
    stopped = threading.Event()
    if config.exit_with_parent:
        lifeline.exit_with_parent(lambda: _parent_is_gone(config.listen, stopped))
    token = transport.read_token(config.token_file) if config.token_file else None
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=MAX_CALLS, thread_name_prefix="call"),
        interceptors=[Guard(token, Patience())],
        options=transport.SERVER_OPTIONS,
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    address = bind(server, config.listen, config.tls_cert, config.tls_key)
    try:
        defaults = {"device": config.device, "deadline_s": f"{config.deadline_s:g}" if config.deadline_s else None}
        config = replace(config, options=with_defaults(config.scorer, config.options, defaults))
        scorer, problem = _ready_scorer(config)
        bridge = _Bridge(scorer, _description(config, problem))
        server.add_generic_rpc_handlers((bridge.handlers(),))
        status = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        for service in ("", messages.SERVICE):
            status.set(service, health_pb2.HealthCheckResponse.SERVING)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        server.start()
        print(f"rewards_bridge: {config.scorer} serving on {address}", flush=True)
        stopped.wait()
        status.enter_graceful_shutdown()
    finally:
        server.stop(STOP_GRACE_S).wait()
        remove_socket(config.listen)
    if not bridge.finish():
        # A thread that is still scoring cannot be stopped, and Python would wait for it at exit.
        sys.stdout.flush()
        os._exit(0)
    return 0


def _ready_scorer(config: ServeConfig) -> tuple[Scorer, str]:
    """Return the loaded scorer and the problem with its results on its test images, "" if there is none.

    Scoring them before training detects what the scorer lacks. The client decides whether wrong results stop a run,
    since a user's own weights may legitimately judge otherwise.
    """
    if config.memory_fraction is not None:
        _limit_memory(config.memory_fraction)
    scorer = load_scorer(config.scorer, config.options)
    right, verdict = doctor.check_example(config.scorer, scorer)
    if right:
        return scorer, ""
    print(f"rewards_bridge: {config.scorer} gets its test images wrong: {verdict}", file=sys.stderr, flush=True)
    return scorer, verdict


def _limit_memory(fraction: float) -> None:
    """Let PyTorch take no more than this part of the memory of any GPU that this process sees."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"--memory-fraction limits PyTorch, which is not there: {error}") from error
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(fraction, index)


def _description(config: ServeConfig, example_problem: str) -> bridge_pb2.DescribeReply:
    defaults = {name: value for name, value in default_options(config.scorer).items() if name not in config.options}
    setup = bridge_pb2.Setup(
        options={name: shown(name, value) for name, value in config.options.items()},
        defaults={name: shown(name, value) for name, value in defaults.items()},
    )
    return bridge_pb2.DescribeReply(
        protocol_version=messages.PROTOCOL_VERSION,
        scorer=config.scorer,
        setup=setup,
        example_problem=redacted(transport.shorten(example_problem)),
    )


def _parent_is_gone(address: str, stopped: threading.Event) -> None:
    """Remove the socket and the folder that the parent created for it, then stop."""
    remove_socket(address)
    if address.startswith("unix:"):
        with suppress(OSError):  # a folder that is not empty was not created by a client
            Path(address.removeprefix("unix:")).parent.rmdir()
    stopped.set()

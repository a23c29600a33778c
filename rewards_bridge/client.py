"""The trainer's side: submit images, get a future of their scores, and never a made-up one.

Imports only the standard library, numpy, grpc and protobuf (Pillow when images of bad scores are kept).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TypeVar

import grpc
import numpy as np

from rewards_bridge.connection import Connection, StuckError, status_text
from rewards_bridge.errors import BadScoresError, BridgeError, DeadlineError, LostError, ScorerError
from rewards_bridge.peer import BridgeConfig, Peer, examine
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.room import Room
from rewards_bridge.scorers.base import Scores
from rewards_bridge.verdicts import check_scores

__all__ = [
    "BadScoresError",
    "BridgeConfig",
    "BridgeError",
    "BridgeStats",
    "DeadlineError",
    "LostError",
    "RewardsClient",
    "ScorerError",
    "examine",
]

IN_FLIGHT = 2  # batches at the server at once: one arrives while another is scored
MAX_WAITING_BYTES = 512 << 20  # of images that wait for their scores; who submits more waits
BROKEN = (
    *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED),
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DEADLINE_EXCEEDED),
)
"""Statuses of a call whose connection or server has failed, so that a new one may do."""
BATCH_AT_FAULT = (
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE),
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a message that is too large; what is only busy is called again
)
"""Statuses that any server would give this call."""

T = TypeVar("T")


@dataclass(frozen=True)
class BridgeStats:
    """What the bridge has done since it was opened; seconds as the server measured them, summed over batches."""

    batches: int = 0
    images: int = 0
    restarts: int = 0
    seconds_receiving: float = 0.0
    seconds_queued: float = 0.0
    seconds_scoring: float = 0.0


@dataclass(frozen=True)
class _Job:
    number: int
    header: bytes
    batch: messages.Batch
    future: Future[Scores]
    kept_images: str | None


class RewardsClient:
    """A scorer at work in another process: one of our own, or one that already runs at an address."""

    def __init__(self, config: BridgeConfig) -> None:
        self._config = config
        self._numbers = itertools.count()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting = Room(MAX_WAITING_BYTES)
        self._lock = threading.Lock()
        self._closed = False
        self._stats = BridgeStats()
        self._peer = Peer(config)
        self._threads = [
            threading.Thread(target=self._work, name=f"rewards-{index}", daemon=True) for index in range(IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict], wait: bool = True
    ) -> Future[Scores]:
        """Score images u8[B,H,W,3] (left unchanged until then); returns at once unless much is waiting already.

        With MAX_WAITING_BYTES of images on their way it returns when there is room, so that a slow scorer does not
        fill the memory; wait=False: at once whatever waits. ValueError if the arguments are not that or do not match.
        The future's errors: DeadlineError and LostError (the scorer is given up), ScorerError (it raised),
        BadScoresError (wrong counts, NaN, infinity), BridgeError.
        """
        return self._submit(images, prompts, metadata, wait, self._config.kept_images)

    def try_out(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Have a scorer of the user's own ("module:Class") judge two test images of this size.

        Shows before anything else is loaded what a scorer returns that cannot be used, such as one number for all
        images. Raises what the future of `submit` has.
        """
        if ":" not in self._config.scorer:
            return  # those that ship here have test images of their own
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
        self._submit(images, [prompt] * 2, [metadata] * 2, False, None).result()

    def _submit(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict], wait: bool, kept_images: str | None
    ) -> Future[Scores]:
        batch = messages.checked_batch(images, prompts, metadata)
        number = next(self._numbers)
        job = _Job(number, messages.encode_header(batch, number), batch, Future(), kept_images)
        if not wait:
            self._waiting.squeeze_in(batch.images.nbytes)
        elif not self._waiting.enter(batch.images.nbytes, is_over=lambda: self._closed):
            raise BridgeError("the client was closed before this batch could be submitted")
        with self._lock:
            if self._closed:
                raise BridgeError("the client is closed; no batch can be submitted")
            self._jobs.put(job)
        job.future.add_done_callback(lambda _: self._waiting.leave(batch.images.nbytes))
        return job.future

    def check(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Why the scorer cannot score some of these prompts, by their index; empty if it can score all.

        Raises ScorerError if it raised, BridgeError as `submit`'s future, ValueError for what cannot be sent.
        """
        problems: dict[int, str] = {}
        for start, reply in self._check_parts(prompts, metadata, with_notes=False):
            problems.update({start + index: text for index, text in reply.problems.items()})
        return dict(sorted(problems.items()))

    def notes(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Return in what the scorer does not score some of these prompts as one may think, by their index.

        Of a prompt that it reads only the beginning of, say. Empty also for a server of a version without notes. Raises
        as `check`.
        """
        notes: dict[int, str] = {}
        for start, reply in self._check_parts(prompts, metadata, with_notes=True):
            notes.update({start + index: text for index, text in reply.notes.items()})
        return dict(sorted(notes.items()))

    def _check_parts(
        self, prompts: Sequence[str], metadata: Sequence[dict], with_notes: bool
    ) -> Iterator[tuple[int, bridge_pb2.CheckReply]]:
        """Yield what the server says of the prompts part by part, each with the index of its first prompt."""
        for start in range(0, len(prompts), messages.CHECKED_AT_ONCE):
            part = slice(start, start + messages.CHECKED_AT_ONCE)
            request = messages.encode_check(prompts[part], metadata[part], with_notes)
            yield start, self._ask(lambda link, request=request: link.check(request, self._config.deadline_s))

    def warnings(self) -> tuple[str, ...]:
        """Return how the server differs from the configuration, and what was let pass; empty if there is nothing."""
        return self._peer.warnings

    def stats(self) -> BridgeStats:
        """Return counts and seconds so far."""
        with self._lock:
            return replace(self._stats, restarts=self._peer.restarts)

    def close(self) -> None:
        """End our scorer process and fail the batches that are not scored. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._waiting.look()
        while not self._jobs.empty():
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job and job.future.set_running_or_notify_cancel():
                job.future.set_exception(BridgeError("the client was closed before this batch was scored"))
        for _ in self._threads:
            self._jobs.put(None)
        self._peer.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Serve one job, or return False at the end (a function of its own: images are not held while waiting)."""
        job = self._jobs.get()
        if job is None:
            return False
        if job.future.set_running_or_notify_cancel():
            try:
                scores = self._score(job)
            except BaseException as error:
                job.future.set_exception(error)
            else:
                job.future.set_result(scores)
        return True

    def _score(self, job: _Job) -> Scores:
        """One batch to its scores, over as many processes as it takes and max_restarts allows."""
        reply = self._ask(
            lambda link: link.score(lambda: messages.encode(job.header, job.batch.images), self._config.deadline_s)
        )
        self._count(job, reply)
        scores = messages.decode_reply(reply)
        check_scores(scores, job.batch, job.number, self._config.scorer, job.kept_images)
        return scores

    def _ask(self, ask: Callable[[Connection], T]) -> T:
        """Return what the server answers, or the one that takes its place; BridgeError if there is none any more."""
        while True:
            link = self._peer.link
            try:
                return ask(link)
            except (grpc.RpcError, StuckError) as error:
                self._recover(link, error)

    def _recover(self, link: Connection, error: grpc.RpcError | StuckError) -> None:
        """Return if the call is to be made again, raise if not."""
        where = f"scorer {self._config.scorer!r} at {link.address}"
        if isinstance(error, StuckError):
            problem = f"{where} finished nothing within deadline_s, {self._config.deadline_s:g} s"
            if not self._peer.is_own:  # it would be the same process again
                raise DeadlineError(problem) from None
            self._peer.recover(link, DeadlineError, problem)
        elif error.code() is grpc.StatusCode.ABORTED:
            raise ScorerError(f"scorer {self._config.scorer!r} raised:\n{error.details()}") from None
        elif error.code() in BROKEN or self._peer.has_died():
            self._peer.recover(link, LostError, f"{where} was lost ({status_text(error)})")
        else:
            kind = BridgeError if error.code() in BATCH_AT_FAULT else LostError
            raise kind(f"{where} refused a batch: {status_text(error)}") from error

    def _count(self, job: _Job, reply: bridge_pb2.ScoreReply) -> None:
        with self._lock:
            before = self._stats
            self._stats = BridgeStats(
                batches=before.batches + 1,
                images=before.images + len(job.batch.prompts),
                seconds_receiving=before.seconds_receiving + reply.seconds_receiving,
                seconds_queued=before.seconds_queued + reply.seconds_queued,
                seconds_scoring=before.seconds_scoring + reply.seconds_scoring,
            )

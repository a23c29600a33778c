"""The trainer's side of the bridge: submit images and get a future of their scores or of an error.

Imports only the standard library, numpy, grpc and protobuf (and Pillow when images of bad scores are saved).
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
MAX_WAITING_BYTES = 512 << 20  # of images that wait for their scores; submitting more blocks
BROKEN = (
    *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED),
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DEADLINE_EXCEEDED),
)
"""Statuses of a failed connection or server, where a new one may succeed."""
BATCH_AT_FAULT = (
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.OUT_OF_RANGE),
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # a message that is too large; a server that is only busy is called again
)
"""Statuses that every server would return for this call."""

T = TypeVar("T")


@dataclass(frozen=True)
class BridgeStats:
    """Counts since the bridge was opened; seconds are measured by the server and summed over batches."""

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
    """Client of a scorer in another process: one that it starts, or one that already runs at an address."""

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
        """Submit images u8[B,H,W,3] for scoring; do not modify them before the result is there.

        Returns immediately while fewer than MAX_WAITING_BYTES of images are waiting; otherwise blocks until there is
        room, so that a slow scorer does not fill the memory. With wait=False it never blocks. Raises ValueError if
        the arguments have another form or do not match. The future's errors: DeadlineError and LostError (the scorer
        is lost), ScorerError (it raised), BadScoresError (wrong counts, NaN, infinity), BridgeError.
        """
        return self._submit(images, prompts, metadata, wait, self._config.kept_images)

    def try_out(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Score two test images of this size with a user's own scorer ("module:Class").

        Detects unusable results, such as one number for all images, before anything else is loaded. Raises the errors
        of the future of `submit`.
        """
        if ":" not in self._config.scorer:
            return  # built-in scorers have test images of their own
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
        """Return, by index, why the scorer cannot score some of these prompts; empty if it can score all.

        Raises ScorerError if the scorer raised, BridgeError as the future of `submit`, and ValueError for prompts or
        metadata that cannot be sent.
        """
        problems: dict[int, str] = {}
        for start, reply in self._check_parts(prompts, metadata, with_notes=False):
            problems.update({start + index: text for index, text in reply.problems.items()})
        return dict(sorted(problems.items()))

    def notes(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Return, by index, notes on prompts that the scorer does not score as a user might expect.

        One example is a prompt of which it reads only the beginning. Empty for a server too old to send notes. Raises
        as `check` does.
        """
        notes: dict[int, str] = {}
        for start, reply in self._check_parts(prompts, metadata, with_notes=True):
            notes.update({start + index: text for index, text in reply.notes.items()})
        return dict(sorted(notes.items()))

    def _check_parts(
        self, prompts: Sequence[str], metadata: Sequence[dict], with_notes: bool
    ) -> Iterator[tuple[int, bridge_pb2.CheckReply]]:
        """Yield the server's replies for successive parts of the prompts, each with the index of its first prompt."""
        for start in range(0, len(prompts), messages.CHECKED_AT_ONCE):
            part = slice(start, start + messages.CHECKED_AT_ONCE)
            request = messages.encode_check(prompts[part], metadata[part], with_notes)
            yield start, self._ask(lambda link, request=request: link.check(request, self._config.deadline_s))

    def warnings(self) -> tuple[str, ...]:
        """Return how the server differs from the configuration, and which problems were tolerated."""
        return self._peer.warnings

    def stats(self) -> BridgeStats:
        """Return the counts and seconds so far."""
        with self._lock:
            return replace(self._stats, restarts=self._peer.restarts)

    def close(self) -> None:
        """Stop the scorer process that we started and fail all unscored batches. Safe to call twice."""
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
        """Serve one job, or return False at the end (a separate function, so that no images are held while waiting)."""
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
        """Return the scores of one batch, with as many restarts as it takes and max_restarts allows."""
        reply = self._ask(
            lambda link: link.score(lambda: messages.encode(job.header, job.batch.images), self._config.deadline_s)
        )
        self._count(job, reply)
        scores = messages.decode_reply(reply)
        check_scores(scores, job.batch, job.number, self._config.scorer, job.kept_images)
        return scores

    def _ask(self, ask: Callable[[Connection], T]) -> T:
        """Return the reply of the server or of its replacement; BridgeError if none is left."""
        while True:
            link = self._peer.link
            try:
                return ask(link)
            except (grpc.RpcError, StuckError) as error:
                self._recover(link, error)

    def _recover(self, link: Connection, error: grpc.RpcError | StuckError) -> None:
        """Return if the call should be repeated; raise otherwise."""
        where = f"scorer {self._config.scorer!r} at {link.address}"
        if isinstance(error, StuckError):
            problem = f"{where} finished nothing within deadline_s, {self._config.deadline_s:g} s"
            if not self._peer.is_own:  # reconnecting would reach the same process
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

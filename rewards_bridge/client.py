"""The trainer's side: submit images, get a future of their scores, and never a made-up one.

Imports only the standard library, numpy, grpc and protobuf (Pillow when images of bad scores are kept).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import grpc
import numpy as np

from rewards_bridge.connection import Connection, status_text
from rewards_bridge.errors import BridgeError, DeadlineError, ScoreError, ScorerError
from rewards_bridge.peer import BridgeConfig, Peer, examine
from rewards_bridge.protocol import bridge_pb2, messages
from rewards_bridge.scorers.base import Scores
from rewards_bridge.verdicts import check_scores

__all__ = [
    "BridgeConfig",
    "BridgeError",
    "BridgeStats",
    "DeadlineError",
    "RewardsClient",
    "ScoreError",
    "ScorerError",
    "examine",
]

IN_FLIGHT = 2  # batches at the server at once: one arrives while another is scored


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


class RewardsClient:
    """A scorer at work in another process: one of our own, or one that already runs at an address."""

    def __init__(self, config: BridgeConfig) -> None:
        self._config = config
        self._numbers = itertools.count()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._stats = BridgeStats()
        self._peer = Peer(config)
        self._threads = [
            threading.Thread(target=self._work, name=f"rewards-{index}", daemon=True) for index in range(IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Future[Scores]:
        """Score images u8[B,H,W,3] (left unchanged until then); returns at once.

        ValueError if they are not that or do not match prompts and metadata. The future's errors: DeadlineError,
        ScorerError (it raised), ScoreError (wrong counts, NaN, infinity), BridgeError (it cannot be reached any more).
        """
        batch = messages.checked_batch(images, prompts, metadata)
        number = next(self._numbers)
        job = _Job(number, messages.encode_header(batch, number), batch, Future())
        with self._lock:
            if self._closed:
                raise BridgeError("the client is closed; no batch can be submitted")
            self._jobs.put(job)
        return job.future

    def check(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Why the scorer cannot score some of these prompts, by their index; empty if it can score all.

        Raises ScorerError if it raised, BridgeError if it cannot be reached, ValueError for what cannot be sent.
        """
        problems: dict[int, str] = {}
        for start in range(0, len(prompts), messages.CHECKED_AT_ONCE):
            part = slice(start, start + messages.CHECKED_AT_ONCE)
            request = messages.encode_check(prompts[part], metadata[part])
            link = self._peer.link
            try:
                found = link.check(request, self._config.deadline_s)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.ABORTED:
                    raise ScorerError(f"scorer {self._config.scorer!r} raised:\n{error.details()}") from None
                raise BridgeError(f"{link.address} could not check the prompts: {status_text(error)}") from error
            problems.update({start + index: text for index, text in found.items()})
        return dict(sorted(problems.items()))

    def warnings(self) -> tuple[str, ...]:
        """Return how the server differs from the configuration, and what was let pass; empty if there is nothing."""
        return self._peer.warnings

    def stats(self) -> BridgeStats:
        """Counts and seconds so far."""
        with self._lock:
            return replace(self._stats, restarts=self._peer.restarts)

    def close(self) -> None:
        """End our scorer process and fail the batches that are not scored. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
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
        while True:
            link = self._peer.link
            try:
                reply = link.score(messages.encode(job.header, job.batch.images), self._config.deadline_s)
            except grpc.RpcError as error:
                self._recover(link, error)
                continue
            self._count(job, reply)
            scores = messages.decode_reply(reply)
            check_scores(scores, job.batch, job.number, self._config.scorer, self._config.kept_images)
            return scores

    def _recover(self, link: Connection, error: grpc.RpcError) -> None:
        """Return if the batch is to be sent again, raise if not."""
        code = error.code()
        scorer = self._config.scorer
        if code is grpc.StatusCode.ABORTED:
            raise ScorerError(f"scorer {scorer!r} raised:\n{error.details()}") from None
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            problem = f"scorer {scorer!r} at {link.address} gave no answer within {self._config.deadline_s:g} s"
            if not self._peer.is_own:
                raise DeadlineError(problem) from None
            self._peer.recover(link, DeadlineError, problem)
        elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or self._peer.has_died():
            problem = f"scorer {scorer!r} at {link.address} was lost ({status_text(error)})"
            self._peer.recover(link, BridgeError, problem)
        else:
            raise BridgeError(f"scorer {scorer!r} at {link.address} refused a batch: {status_text(error)}") from error

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

"""One scorer in several processes or on several machines: batches go to the least busy replica that is not lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from rewards_bridge.client import BridgeConfig, BridgeStats, RewardsClient
from rewards_bridge.errors import BridgeError, LostError, UsageError
from rewards_bridge.scorers.base import Scores

_LOG = logging.getLogger("rewards_bridge")


@dataclass(frozen=True)
class _Batch:
    images: np.ndarray
    prompts: Sequence[str]
    metadata: Sequence[dict]
    future: Future[Scores]


class Replicas:
    """Clients of one scorer that share its batches; used like one client, and working while any of them is left.

    A lost replica (its restarts or reconnections are used up, or its deadline has passed) gets no more batches, and
    its unfinished ones go to another. Errors of the scorer itself or of the batch are not retried: they would recur.
    """

    def __init__(self, configs: Sequence[BridgeConfig]) -> None:
        if not configs:
            raise UsageError("a scorer needs at least one replica: set replicas or addresses")
        self._clients = open_all(configs)
        self._waiting = [0] * len(self._clients)
        self._lost: dict[int, BaseException] = {}
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Future[Scores]:
        """Submit images u8[B,H,W,3] as `RewardsClient.submit` does, to the least busy replica."""
        batch = _Batch(images, prompts, metadata, Future())
        self._send(batch, wait=True)
        return batch.future

    def check(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Return why the scorer cannot score some of these prompts, as `RewardsClient.check` does."""
        return self._first_alive().check(prompts, metadata)

    def notes(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Return notes on how the scorer treats some of these prompts, as `RewardsClient.notes` does."""
        return self._first_alive().notes(prompts, metadata)

    def try_out(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Try out a user's own scorer, as `RewardsClient.try_out` does; one replica suffices, since all are alike."""
        self._clients[0].try_out(prompt, metadata, height, width)

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all replicas, as `RewardsClient.warnings` does, without duplicates."""
        return tuple(dict.fromkeys(text for client in self._clients for text in client.warnings()))

    def stats(self) -> list[BridgeStats]:
        """Return the counts and seconds so far of every replica."""
        return [client.stats() for client in self._clients]

    def close(self) -> None:
        """Stop the processes that we started and fail all unscored batches. Safe to call twice."""
        self._closed = True
        for client in self._clients:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _first_alive(self) -> RewardsClient:
        with self._lock:
            return self._clients[self._alive()[0]]

    def _alive(self) -> list[int]:
        """Return the indexes of the replicas that are not lost.

        If none is left, return all of them: their errors give the reasons.
        """
        return [index for index in range(len(self._clients)) if index not in self._lost] or [*range(len(self._clients))]

    def _send(self, batch: _Batch, wait: bool) -> None:
        """Send a batch to a replica; wait: whether to block until it has room."""
        with self._lock:
            alive = self._alive()
            index = min(alive, key=lambda index: self._waiting[index])
            self._waiting[index] += 1
        try:
            ticket = self._clients[index].submit(batch.images, batch.prompts, batch.metadata, wait)
        except BaseException:
            with self._lock:
                self._waiting[index] -= 1
            raise
        ticket.add_done_callback(partial(self._scored, batch, index))

    def _scored(self, batch: _Batch, index: int, ticket: Future[Scores]) -> None:
        with self._lock:
            self._waiting[index] -= 1
        error = ticket.exception()
        if error is None:
            batch.future.set_result(ticket.result())
        elif self._closed or not self._may_leave_out(index, error):
            batch.future.set_exception(error)
        else:
            try:
                self._send(batch, wait=False)
            except BaseException as problem:
                batch.future.set_exception(problem)

    def _may_leave_out(self, index: int, error: BaseException) -> bool:
        """Return whether the replica is lost and another one can take over its batches."""
        if not isinstance(error, LostError):
            return False
        with self._lock:
            if index not in self._lost:
                self._lost[index] = error
                left = len(self._clients) - len(self._lost)
                _LOG.warning("replica %d is lost and gets no more batches, %d left: %s", index, left, error)
            return len(self._lost) < len(self._clients)


def open_all(configs: Sequence[BridgeConfig]) -> list[RewardsClient]:
    """Open all clients in parallel, since loading a scorer is slow; if one fails, close the others and raise."""
    with ThreadPoolExecutor(max_workers=len(configs)) as pool:
        opening = [pool.submit(RewardsClient, config) for config in configs]
    failed = [future.exception() for future in opening if future.exception() is not None]
    if not failed:
        return [future.result() for future in opening]
    for future in opening:
        if future.exception() is None:
            future.result().close()
    raise failed[0] or BridgeError("a scorer could not be opened")

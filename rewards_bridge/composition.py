"""Several scorers as one: every part scores every image, all at the same time; their weighted sum is optimised."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from rewards_bridge.client import BridgeConfig, BridgeStats
from rewards_bridge.errors import UsageError
from rewards_bridge.replicas import Replicas
from rewards_bridge.scorers.base import Scores

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One scorer of a composition: what its score counts, and the processes or servers that hold it."""

    weight: float
    replicas: tuple[BridgeConfig, ...]


class Composition:
    """Scorers by name, used like one client.

    score = sum of weight * score. Of one part, raw values keep their names; of several, raw value "x" of part "p" is
    "p/x" and the part's score "p/score"; their details are left out. A raw value named "score" is then "p/raw/score".
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        if not parts:
            raise UsageError("a composition needs at least one scorer")
        bad = [f"{name}: {part.weight}" for name, part in parts.items() if not np.isfinite(part.weight)]
        if bad:
            raise UsageError(f"weights have to be finite numbers; found {', '.join(bad)}")
        self._weights = {name: part.weight for name, part in parts.items()}
        with ThreadPoolExecutor(max_workers=len(parts)) as pool:  # loading takes long: all at once
            opening = {name: pool.submit(Replicas, part.replicas) for name, part in parts.items()}
        failed = [error for future in opening.values() if (error := future.exception()) is not None]
        if failed:
            for future in opening.values():
                if future.exception() is None:
                    future.result().close()
            raise failed[0]
        self._parts = {name: future.result() for name, future in opening.items()}

    def submit(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Future[Scores]:
        """Score images u8[B,H,W,3] by every part; returns at once.

        ValueError as from `RewardsClient.submit`. The future has the first error of any part.
        """
        joined = _Joined(self._weights)
        for name, part in self._parts.items():
            joined.add(name, part.submit(images, prompts, metadata))
        return joined.future

    def check(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Why some part cannot score some of these prompts, by their index, each reason after its part's name."""
        problems: dict[int, str] = {}
        for name, part in self._parts.items():
            for index, text in part.check(prompts, metadata).items():
                problems[index] = f"{problems[index]}; {name}: {text}" if index in problems else f"{name}: {text}"
        return dict(sorted(problems.items()))

    def notes(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[str, dict[int, str]]:
        """Return what each part says of prompts as `RewardsClient.notes` does, by the part's name."""
        return {name: part.notes(prompts, metadata) for name, part in self._parts.items()}

    def try_out(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Try out the scorers of the user's own on images of this size, as `RewardsClient.try_out`."""
        for part in self._parts.values():
            part.try_out(prompt, metadata, height, width)

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all parts, as `RewardsClient.warnings`."""
        return tuple(f"{name}: {text}" for name, part in self._parts.items() for text in part.warnings())

    def stats(self) -> dict[str, list[BridgeStats]]:
        """Return counts and seconds of every part's replicas so far."""
        return {name: part.stats() for name, part in self._parts.items()}

    def close(self) -> None:
        """End the processes we started and fail the batches that are not scored. Safe to call twice."""
        for part in self._parts.values():
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Joined:
    """The future of a batch's weighted sum, set by the part that ends last or fails first."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.future: Future[Scores] = Future()
        self._weights = weights
        self._found: dict[str, Scores] = {}
        self._lock = threading.Lock()

    def add(self, name: str, ticket: Future[Scores]) -> None:
        ticket.add_done_callback(lambda done: self._scored(name, done))

    def _scored(self, name: str, ticket: Future[Scores]) -> None:
        error = ticket.exception()
        with self._lock:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
                return
            self._found[name] = ticket.result()
            if len(self._found) == len(self._weights):
                self.future.set_result(compose(self._weights, self._found))


def apart(raw: Mapping[str, T], taken: Iterable[str]) -> dict[str, T]:
    """Return raw values under names of their own: those that are taken get "raw/" before them, the others stay."""
    used = {*taken}
    named = {name: values for name, values in raw.items() if name not in used}
    for name in sorted(raw.keys() - named.keys()):
        free = f"raw/{name}"
        while free in used or free in named:
            free = f"raw/{free}"
        named[free] = raw[name]
    return named


def compose(weights: Mapping[str, float], parts: Mapping[str, Scores]) -> Scores:
    """Return the weighted sum of the parts' scores f32[B], everything raw and every reason under its part's name."""
    names = list(weights)
    total = sum(np.float64(weights[name]) * parts[name].score.astype(np.float64) for name in names)
    score = np.asarray(total, np.float64).astype(np.float32)
    if len(names) == 1:
        only = parts[names[0]]
        return Scores(score=score, raw=only.raw, reasons=only.reasons, details=only.details)
    raw: dict[str, np.ndarray] = {}
    for name in names:
        raw[f"{name}/score"] = parts[name].score
        named = {f"{name}/{key}": values for key, values in apart(parts[name].raw, ("score",)).items()}
        raw.update(apart(named, raw))
    rows = zip(*(parts[name].reasons for name in names), strict=True)
    reasons = ["; ".join(f"{name}: {text}" for name, text in zip(names, row, strict=True) if text) for row in rows]
    return Scores(score=score, raw=raw, reasons=reasons)

"""Several scorers as one: every part scores every image, in parallel, and the weighted sum is the reward."""

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
    """One scorer of a composition: the weight of its score, and the processes or servers that run it."""

    weight: float
    replicas: tuple[BridgeConfig, ...]


class Composition:
    """Scorers by name, used like a single client.

    score = sum of weight * score. With one part, raw values keep their names. With several, raw value "x" of part "p"
    becomes "p/x", the part's score "p/score" and a raw value named "score" "p/raw/score"; details are left out.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        if not parts:
            raise UsageError("a composition needs at least one scorer")
        bad = [f"{name}: {part.weight}" for name, part in parts.items() if not np.isfinite(part.weight)]
        if bad:
            raise UsageError(f"weights must be finite numbers; found {', '.join(bad)}")
        self._weights = {name: part.weight for name, part in parts.items()}
        with ThreadPoolExecutor(max_workers=len(parts)) as pool:  # in parallel, since loading is slow
            opening = {name: pool.submit(Replicas, part.replicas) for name, part in parts.items()}
        failed = [error for future in opening.values() if (error := future.exception()) is not None]
        if failed:
            for future in opening.values():
                if future.exception() is None:
                    future.result().close()
            raise failed[0]
        self._parts = {name: future.result() for name, future in opening.items()}

    def submit(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Future[Scores]:
        """Submit images u8[B,H,W,3] to every part; may block as `RewardsClient.submit` does.

        Raises ValueError as `RewardsClient.submit` does. The future gets the first error of any part.
        """
        joined = _Joined(self._weights)
        for name, part in self._parts.items():
            joined.add(name, part.submit(images, prompts, metadata))
        return joined.future

    def check(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[int, str]:
        """Return, by index, why some part cannot score some of these prompts; reasons start with the part's name."""
        problems: dict[int, str] = {}
        for name, part in self._parts.items():
            for index, text in part.check(prompts, metadata).items():
                problems[index] = f"{problems[index]}; {name}: {text}" if index in problems else f"{name}: {text}"
        return dict(sorted(problems.items()))

    def notes(self, prompts: Sequence[str], metadata: Sequence[dict]) -> dict[str, dict[int, str]]:
        """Return the notes of each part, by its name, as `RewardsClient.notes` does."""
        return {name: part.notes(prompts, metadata) for name, part in self._parts.items()}

    def try_out(self, prompt: str, metadata: dict, height: int, width: int) -> None:
        """Try out the user's own scorers on images of this size, as `RewardsClient.try_out` does."""
        for part in self._parts.values():
            part.try_out(prompt, metadata, height, width)

    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all parts, as `RewardsClient.warnings` does."""
        return tuple(f"{name}: {text}" for name, part in self._parts.items() for text in part.warnings())

    def stats(self) -> dict[str, list[BridgeStats]]:
        """Return the counts and seconds so far of every part's replicas."""
        return {name: part.stats() for name, part in self._parts.items()}

    def close(self) -> None:
        """Stop the processes that we started and fail all unscored batches. Safe to call twice."""
        for part in self._parts.values():
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Joined:
    """The future of a batch's weighted sum, set by the part that finishes last or fails first."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.future: Future[Scores] = Future()
        self._weights = weights
        self._scores: dict[str, Scores] = {}
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
            self._scores[name] = ticket.result()
            if len(self._scores) == len(self._weights):
                self.future.set_result(compose(self._weights, self._scores))


def apart(raw: Mapping[str, T], taken: Iterable[str]) -> dict[str, T]:
    """Return raw values under unique names: names in `taken` are prefixed with "raw/", the others stay."""
    used = {*taken}
    named = {name: values for name, values in raw.items() if name not in used}
    for name in sorted(raw.keys() - named.keys()):
        free = f"raw/{name}"
        while free in used or free in named:
            free = f"raw/{free}"
        named[free] = raw[name]
    return named


def compose(weights: Mapping[str, float], parts: Mapping[str, Scores]) -> Scores:
    """Return the weighted sum of the parts' scores f32[B]; raw values and reasons are labelled with the part's name."""
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

"""The best and the worst images of an evaluation, with their scores and the judge's reasons, kept as one PNG."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from rewards_bridge.scorers.base import Scores
from udm_grpo.reporting.pictures import image_grid

COLUMNS = 4


@dataclass(frozen=True)
class Judged:
    """An image with its scores."""

    index: int
    """Number of the image in the evaluation."""
    image: UInt8[np.ndarray, "H W 3"]
    prompt: str
    score: float
    raw: dict[str, float]
    reason: str


class Extremes:
    """Keeps the `most` best and the `most` worst images as they are scored, and of each prompt only its best and worst.

    images: number of images of the evaluation; any further ones are padding. The result does not depend on the batches:
    of equal scores the earlier image counts. seen, best, worst: how many an earlier start has seen, and what it kept.
    """

    def __init__(
        self, most: int, images: int, seen: int = 0, best: Sequence[Judged] = (), worst: Sequence[Judged] = ()
    ):
        self._most, self._left, self._seen = most, images - seen, seen
        self._waiting: list[tuple[np.ndarray, Sequence[str], Future[Scores]]] = []
        self._best = {judged.prompt: judged for judged in best}
        self._worst = {judged.prompt: judged for judged in worst}

    def watch(self, images: UInt8[np.ndarray, "B H W 3"], prompts: Sequence[str], ticket: Future[Scores]) -> None:
        """Process a batch once it is scored; batches come in order, and one whose scorer failed is the last."""
        if not self._most:
            return
        self._waiting.append((images, prompts, ticket))
        # Immediately, so that only images that wait for scores are held in memory.
        while self._waiting and self._waiting[0][2].done() and self._waiting[0][2].exception() is None:
            self._look(*self._waiting.pop(0))

    def so_far(self) -> tuple[tuple[Judged, ...], tuple[Judged, ...]]:
        """Return the best and the worst of the batches before the first whose scorer failed; waits for the scores."""
        while self._waiting and self._waiting[0][2].exception() is None:
            self._look(*self._waiting.pop(0))
        return tuple(self._best.values()), tuple(self._worst.values())

    def best(self) -> list[Judged]:
        """Return the best images, best first; waits for the scores. Raises what the scorer raised."""
        self._finish()
        return list(self._best.values())

    def worst(self) -> list[Judged]:
        """Return the worst images, worst first; waits for the scores. Raises what the scorer raised."""
        self._finish()
        return list(self._worst.values())

    def write(self, path: Path, run: str = "") -> None:
        """Write the kept images, if any, as one labelled PNG.

        Its text chunk has the scores, the reasons and the id of the run.
        """
        kept = [("best", judged) for judged in self.best()] + [("worst", judged) for judged in self.worst()]
        if not kept:
            return
        details = [
            {
                "kind": kind,
                "prompt": judged.prompt,
                "score": judged.score,
                "raw": judged.raw,
                "reason": judged.reason,
            }
            for kind, judged in kept
        ]
        captions = [f"{kind} {judged.score:.3f} {judged.prompt}" for kind, judged in kept]
        image_grid(np.stack([judged.image for _, judged in kept]), captions, COLUMNS, path, details, run)

    def _finish(self) -> None:
        while self._waiting:
            self._look(*self._waiting.pop(0))

    def _look(self, images: np.ndarray, prompts: Sequence[str], ticket: Future[Scores]) -> None:
        scores = ticket.result()
        count = min(len(images), self._left)
        self._left -= count
        for i in range(count):
            raw = {name: float(values[i]) for name, values in scores.raw.items()}
            judged = Judged(
                self._seen + i, images[i].copy(), prompts[i], float(scores.score[i]), raw, scores.reasons[i]
            )
            _keep(self._best, judged, -1)
            _keep(self._worst, judged, 1)
        self._seen += count
        self._best = _first(self._best, self._most, -1)
        self._worst = _first(self._worst, self._most, 1)


def _order(judged: Judged, sign: int) -> tuple[float, int]:
    return sign * judged.score, judged.index


def _keep(kept: dict[str, Judged], judged: Judged, sign: int) -> None:
    if judged.prompt not in kept or _order(judged, sign) < _order(kept[judged.prompt], sign):
        kept[judged.prompt] = judged


def _first(kept: dict[str, Judged], most: int, sign: int) -> dict[str, Judged]:
    """Return the first `most`; a prompt that is dropped can return only with an image that beats the one it lost."""
    ordered = sorted(kept.items(), key=lambda item: _order(item[1], sign))
    return dict(ordered[:most])

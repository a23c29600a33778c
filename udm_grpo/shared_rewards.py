"""Send images to the scorers of this host, and gather the scores of all hosts."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rewards_bridge.composition import Composition
from rewards_bridge.errors import BridgeError
from rewards_bridge.scorers.base import Scores
from udm_grpo.config import RewardsConfig
from udm_grpo.lifecycle.interruption import Interruption
from udm_grpo.multihost import hosts
from udm_grpo.scoring import rewards
from udm_grpo.scoring.rewards import Rewards

MAX_TEXT = 4000
"""Maximum length, in characters, of a scorer's error message sent to the other processes."""


class ScoringFailedError(BridgeError):
    """The scorers of one of several processes failed; all processes raise this at the same point."""


def connect(config: RewardsConfig, kept_images: Path, asked: Interruption, stack: contextlib.ExitStack) -> Composition:
    """Load the scorers with `rewards.connect`; `stack` closes them.

    Raises StopRequestedError, in all processes, if the run is asked to stop meanwhile.
    """
    asked.check()
    try:
        client = stack.enter_context(rewards.connect(config, kept_images, lambda: asked.requested))
    except BridgeError:
        if not asked.requested:
            raise
    asked.check()
    return client


@dataclass(frozen=True)
class Ticket:
    """Images of this host that were sent to its scorers."""

    rows: np.ndarray
    """Their indices among all images."""
    scores: "Future[Scores]"


def submit(
    client: Composition, images: jax.Array, first: int, texts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[Ticket]:
    """Send this host's rows of the images u8[m, H, W, 3], whose indices start at `first`; [] if it has none.

    texts, metadata: those of the images to score, the first ones of the m; the others are padding.
    """
    rows = hosts.owned_rows(images.sharding, len(images))
    rows = rows[rows < len(texts)]
    if not len(rows):
        return []
    mine = hosts.take(images, rows)
    return [Ticket(first + rows, client.submit(mine, [texts[row] for row in rows], [metadata[row] for row in rows]))]


def failed(tickets: Sequence[Ticket]) -> bool:
    """Return whether the scorers of this host have already failed at one of the tickets."""
    return any(ticket.scores.done() and ticket.scores.exception() is not None for ticket in tickets)


def collect(tickets: Sequence[Ticket], count: int, first: int = 0) -> Rewards:
    """Wait for this host's scores and gather those of all hosts, for the `count` images from `first` on.

    Raises what a scorer of this host raised or, with several processes, ScoringFailedError in all of them.
    """
    rows = np.concatenate([ticket.rows for ticket in tickets]) - first if tickets else np.zeros(0, np.int64)
    columns: dict[str, np.ndarray] = {}
    problem: Exception | None = None
    try:
        if tickets:
            mine = rewards.collect([ticket.scores for ticket in tickets])
            columns = {"score": mine.score} | {f"raw/{name}": values for name, values in mine.raw.items()}
    except Exception as error:
        problem = error
    _agree(problem)
    gathered = hosts.gather_rows(columns, rows, count)
    return Rewards(gathered.pop("score"), {name.removeprefix("raw/"): values for name, values in gathered.items()})


def _agree(problem: Exception | None) -> None:
    """Raise in all processes if one has a problem, so that none waits for scores that never arrive."""
    if jax.process_count() == 1:
        if problem is not None:
            raise problem
        return
    texts = hosts.gather(None if problem is None else str(problem)[:MAX_TEXT])
    lines = [f"process {process}: {text}" for process, text in enumerate(texts) if text is not None]
    if lines:
        raise ScoringFailedError("\n  ".join(["the images cannot be scored:", *lines])) from problem

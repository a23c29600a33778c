"""Pictures to this host's scorers, scores from all hosts."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rewards_bridge.composition import Composition
from rewards_bridge.scorers.base import Scores
from udm_grpo import hosts
from udm_grpo.host import rewards
from udm_grpo.host.rewards import Rewards


@dataclass(frozen=True)
class Ticket:
    """Pictures of this host on their way to its scorers."""

    rows: np.ndarray
    """Which of all the pictures they are."""
    scores: "Future[Scores]"


def submit(
    client: Composition, images: jax.Array, first: int, texts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[Ticket]:
    """Send this host's rows of the pictures u8[m, H, W, 3], numbers `first` and following; none if it has none.

    texts, metadata: of the pictures that are scored, the first of the m; the others are padding.
    """
    rows = hosts.owned_rows(images.sharding, len(images))
    rows = rows[rows < len(texts)]
    if not len(rows):
        return []
    mine = hosts.take(images, rows)
    return [Ticket(first + rows, client.submit(mine, [texts[row] for row in rows], [metadata[row] for row in rows]))]


def collect(tickets: Sequence[Ticket], count: int) -> Rewards:
    """Wait for this host's scores and join those of all hosts, which are of `count` pictures."""
    rows = np.concatenate([ticket.rows for ticket in tickets]) if tickets else np.zeros(0, np.int64)
    columns: dict[str, np.ndarray] = {}
    if tickets:
        mine = rewards.collect([ticket.scores for ticket in tickets])
        columns = {"score": mine.score} | {f"raw/{name}": values for name, values in mine.raw.items()}
    found = hosts.gather_rows(columns, rows, count)
    return Rewards(found.pop("score"), {name.removeprefix("raw/"): values for name, values in found.items()})

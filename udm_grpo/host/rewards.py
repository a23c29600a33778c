"""From pictures to rewards: the trainer's side of the bridge."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig, RewardsClient
from rewards_bridge.scorers.base import Scores


@dataclass(frozen=True)
class Rewards:
    """What the scorers say of B images, in their order."""

    score: np.ndarray
    """f32[B], what is optimised."""
    raw: dict[str, np.ndarray]
    """f32[B] each, what is logged."""


def connect(
    scorer: str,
    options: dict[str, str],
    address: str,
    interpreter: str,
    environment: dict[str, str],
    deadline_s: float,
    start_timeout_s: float,
    max_restarts: int,
    tls_ca: str,
    token_file: str,
    kept_images: Path,
) -> RewardsClient:
    """Start the scorer's process, or reach it at `address`; images of a batch that fails go to `kept_images`."""
    return RewardsClient(
        BridgeConfig(
            scorer=scorer,
            options=dict(options),
            address=address or None,
            interpreter=interpreter or None,
            environment=dict(environment),
            deadline_s=deadline_s,
            start_timeout_s=start_timeout_s,
            max_restarts=max_restarts,
            kept_images=str(kept_images),
            tls_ca=tls_ca or None,
            token_file=token_file or None,
        )
    )


def collect(tickets: Sequence["Future[Scores]"], images: int | None = None) -> Rewards:
    """Wait for submitted micro-batches and join them in order; `images` drops what was only padding."""
    parts = [ticket.result() for ticket in tickets]
    raw: dict[str, Any] = {name: np.concatenate([part.raw[name] for part in parts])[:images] for name in parts[0].raw}
    return Rewards(score=np.concatenate([part.score for part in parts])[:images], raw=raw)

"""From pictures to rewards: the trainer's side of the bridge."""

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig
from rewards_bridge.composition import Composition, Part
from rewards_bridge.scorers.base import Scores
from udm_grpo.config import RewardsConfig, ScorerConfig


@dataclass(frozen=True)
class Rewards:
    """What the scorers say of B images, in their order."""

    score: np.ndarray
    """f32[B], what is optimised."""
    raw: dict[str, np.ndarray]
    """f32[B] each, what is logged."""


def connect(config: RewardsConfig, kept_images: Path) -> Composition:
    """Start every scorer's processes, or reach its servers; images of a batch that fails go to `kept_images`/part.

    Raises BridgeError for a scorer that gets its test images wrong, unless its check_example is off.
    """
    return Composition(
        {name: Part(given.weight, _replicas(name, given, kept_images / name)) for name, given in config.scorers.items()}
    )


def warn_of(clients: Iterable[Composition]) -> None:
    """Give one warning of everything in which the scorers are not what the configuration says."""
    found = [text for client in clients for text in client.warnings()]
    if found:
        heading = "scorers are not quite what this configuration says; what the server was started with counts:"
        warnings.warn("\n  ".join([heading, *found]), stacklevel=2)


def _replicas(name: str, given: ScorerConfig, kept_images: Path) -> tuple[BridgeConfig, ...]:
    places: list[str | None] = list(given.addresses) or [None] * given.replicas
    return tuple(
        BridgeConfig(
            scorer=given.scorer or name,
            options=dict(given.options),
            address=address,
            interpreter=given.interpreter or None,
            environment=dict(given.environment),
            deadline_s=given.deadline_s,
            start_timeout_s=given.start_timeout_s,
            max_restarts=given.max_restarts,
            kept_images=str(kept_images / str(index) if len(places) > 1 else kept_images),
            tls_ca=given.tls_ca or None,
            token_file=given.token_file or None,
            check_example=given.check_example,
        )
        for index, address in enumerate(places)
    )


def collect(tickets: Sequence["Future[Scores]"], images: int | None = None) -> Rewards:
    """Wait for submitted micro-batches and join them in order; `images` drops what was only padding."""
    parts = [ticket.result() for ticket in tickets]
    raw: dict[str, Any] = {name: np.concatenate([part.raw[name] for part in parts])[:images] for name in parts[0].raw}
    return Rewards(score=np.concatenate([part.score for part in parts])[:images], raw=raw)

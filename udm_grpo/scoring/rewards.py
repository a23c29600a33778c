"""From pictures to rewards: the trainer's side of the bridge."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig
from rewards_bridge.composition import Composition, Part
from rewards_bridge.scorers.base import Scores
from udm_grpo.config import RewardsConfig, ScorerConfig
from udm_grpo.machine.gpu_split import AUTO, CPU, SHARED
from udm_grpo.machine.gpus import VISIBLE
from udm_grpo.reporting.raw_values import joined


@dataclass(frozen=True)
class Rewards:
    """What the scorers say of B images, in their order."""

    score: np.ndarray
    """f32[B], what is optimised."""
    raw: dict[str, np.ndarray]
    """f32[B] each, what is logged; NaN for an image that its scorer gave no such value."""


def connect(config: RewardsConfig, kept_images: Path, cancelled: Callable[[], bool] | None = None) -> Composition:
    """Start every scorer's processes, or reach its servers; images of a batch that fails go to `kept_images`/part.

    cancelled: asked again and again while a scorer loads; True ends the waiting with a BridgeError.
    Raises BridgeError for a scorer that gets its test images wrong, unless its check_example is off.
    """
    return Composition(
        {
            name: Part(given.weight, bridge_configs(name, given, kept_images / name, cancelled))
            for name, given in config.scorers.items()
        }
    )


def warn_of(clients: Iterable[Composition]) -> None:
    """Give one warning of everything in which the scorers are not what the configuration says."""
    found = [text for client in clients for text in client.warnings()]
    if found:
        heading = "scorers are not quite what this configuration says; what the server was started with counts:"
        warnings.warn("\n  ".join([heading, *found]), stacklevel=2)


def bridge_configs(
    name: str, given: ScorerConfig, kept_images: Path | None, cancelled: Callable[[], bool] | None = None
) -> tuple[BridgeConfig, ...]:
    """Return what each process or server of a scorer is to the bridge; its devices are ids, or "cpu"."""
    places: list[dict[str, Any]] = [{"environment": dict(given.environment)}] * given.replicas
    if given.addresses:
        places = [{"address": address} for address in given.addresses]
    elif given.devices:
        places = [_on_device(given, device) for device in given.devices]
    return tuple(
        BridgeConfig(
            **place,
            scorer=given.scorer or name,
            options=dict(given.options),
            interpreter=given.interpreter or None,
            memory_fraction=given.memory_fraction or None,
            deadline_s=given.deadline_s,
            start_timeout_s=given.start_timeout_s,
            max_restarts=given.max_restarts,
            kept_images=_folder_of(kept_images, index, len(places)),
            tls_ca=given.tls_ca or None,
            token_file=given.token_file or None,
            check_example=given.check_example,
            cancelled=cancelled,
        )
        for index, place in enumerate(places)
    )


def _folder_of(kept_images: Path | None, index: int, count: int) -> str | None:
    if kept_images is None:
        return None
    return str(kept_images / str(index) if count > 1 else kept_images)


def _on_device(given: ScorerConfig, device: str) -> dict[str, Any]:
    """Where one process runs: it sees one GPU, which is the first to it, or none."""
    if device in (AUTO, SHARED):
        raise ValueError(f"devices={device} is not decided yet; connect inside of gpu_split.reserved")
    visible, own = ("", CPU) if device == CPU else (device, "cuda:0")
    return {"environment": {**given.environment, VISIBLE: visible}, "device": own}


def collect(tickets: Sequence["Future[Scores]"], images: int | None = None) -> Rewards:
    """Wait for submitted micro-batches and join them in order; `images` drops what was only padding."""
    parts = [ticket.result() for ticket in tickets]
    raw = joined([part.raw for part in parts], [len(part.score) for part in parts])
    score = np.concatenate([part.score for part in parts])[:images]
    return Rewards(score=score, raw={name: values[:images] for name, values in raw.items()})

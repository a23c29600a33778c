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
    """Scores of B images, in their order."""

    score: np.ndarray
    """f32[B], the total reward, which is optimised."""
    raw: dict[str, np.ndarray]
    """f32[B] each, for logging; NaN for images without such a value."""


def connect(config: RewardsConfig, kept_images: Path, cancelled: Callable[[], bool] | None = None) -> Composition:
    """Start every scorer's processes, or connect to its servers; images of a failed batch go to `kept_images`/part.

    cancelled: polled while a scorer loads; True ends the waiting with a BridgeError.
    Raises BridgeError for a scorer that misjudges its test images, unless its check_example is off.
    """
    return Composition(
        {
            name: Part(scorer.weight, bridge_configs(name, scorer, kept_images / name, cancelled))
            for name, scorer in config.scorers.items()
        }
    )


def warn_of(clients: Iterable[Composition]) -> None:
    """Issue one warning that lists how the scorers differ from the configuration."""
    differences = [text for client in clients for text in client.warnings()]
    if differences:
        heading = "scorers differ from this configuration; the settings with which the server was started apply:"
        warnings.warn("\n  ".join([heading, *differences]), stacklevel=2)


def bridge_configs(
    name: str, config: ScorerConfig, kept_images: Path | None, cancelled: Callable[[], bool] | None = None
) -> tuple[BridgeConfig, ...]:
    """Return the bridge's configuration of each process or server of a scorer, whose devices are ids or "cpu"."""
    places: list[dict[str, Any]] = [{"environment": dict(config.environment)}] * config.replicas
    if config.addresses:
        places = [{"address": address} for address in config.addresses]
    elif config.devices:
        places = [_on_device(config, device) for device in config.devices]
    return tuple(
        BridgeConfig(
            **place,
            scorer=config.scorer or name,
            options=dict(config.options),
            interpreter=config.interpreter or None,
            memory_fraction=config.memory_fraction or None,
            deadline_s=config.deadline_s,
            start_timeout_s=config.start_timeout_s,
            max_restarts=config.max_restarts,
            kept_images=_folder_of(kept_images, index, len(places)),
            tls_ca=config.tls_ca or None,
            token_file=config.token_file or None,
            check_example=config.check_example,
            cancelled=cancelled,
        )
        for index, place in enumerate(places)
    )


def _folder_of(kept_images: Path | None, index: int, count: int) -> str | None:
    if kept_images is None:
        return None
    return str(kept_images / str(index) if count > 1 else kept_images)


def _on_device(config: ScorerConfig, device: str) -> dict[str, Any]:
    """Return where a process runs: it sees one GPU, as its first, or none."""
    if device in (AUTO, SHARED):
        raise ValueError(f"devices={device} is not decided yet; connect inside gpu_split.reserved")
    visible, own = ("", CPU) if device == CPU else (device, "cuda:0")
    return {"environment": {**config.environment, VISIBLE: visible}, "device": own}


def collect(tickets: Sequence["Future[Scores]"], images: int | None = None) -> Rewards:
    """Wait for submitted micro-batches and join them in order; rows past `images` are padding and dropped."""
    parts = [ticket.result() for ticket in tickets]
    raw = joined([part.raw for part in parts], [len(part.score) for part in parts])
    score = np.concatenate([part.score for part in parts])[:images]
    return Rewards(score=score, raw={name: values[:images] for name, values in raw.items()})

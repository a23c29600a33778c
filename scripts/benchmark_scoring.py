"""The scoring stage of the benchmark: pictures to a scorer in a process of its own, and their scores back."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig, RewardsClient
from scripts.benchmark_stages import Setting, Stage
from udm_grpo.worlds.shapes import all_prompts


@contextlib.contextmanager
def scoring_stage(setting: Setting) -> Iterator[Stage]:
    """Start a scorer that needs no weights, for the length of the block: shapes for its own world, jpeg for others."""
    m, config = setting.steps.sizes.rollout, setting.config.model
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (m, config.height, config.width, 3), np.uint8)
    own_world = "shapes" in setting.config.rewards.scorers
    metadata: list[dict[str, Any]] = [dict(all_prompts()[0]) if own_world else {} for _ in range(m)]
    prompts = [str(row.get("prompt", "a picture")) for row in metadata]
    with RewardsClient(BridgeConfig(scorer="shapes" if own_world else "jpeg")) as client:
        yield Stage("scoring", lambda: client.submit(pictures, prompts, metadata).result().score, m)

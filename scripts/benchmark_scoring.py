"""The scoring stage of the benchmark: a round trip of images and scores to a scorer in a process of its own."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig, RewardsClient
from scripts.benchmark_stages import Setting, Stage
from udm_grpo.worlds.shapes import all_prompts


@contextlib.contextmanager
def scoring_stage(setting: Setting) -> Iterator[Stage]:
    """Run a scorer that needs no weights for the duration of the block: shapes for the shapes world, jpeg otherwise."""
    m, config = setting.steps.sizes.rollout, setting.config.model
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (m, config.height, config.width, 3), np.uint8)
    own_world = "shapes" in setting.config.rewards.scorers
    metadata: list[dict[str, Any]] = [dict(all_prompts()[0]) if own_world else {} for _ in range(m)]
    prompts = [str(row.get("prompt", "a picture")) for row in metadata]
    with RewardsClient(BridgeConfig(scorer="shapes" if own_world else "jpeg")) as client:
        yield Stage("scoring", lambda: client.submit(pictures, prompts, metadata).result().score, m)

"""A tiny transformer, its objective, and random training states for both."""

import jax.numpy as jnp
import numpy as np

from udm_grpo.batches import Samples
from udm_grpo.grpo.loss import UDMGRPO
from udm_grpo.grpo.trajectory import TrajectoryPlan
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.network import Network

CONFIG = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 40, 10, 40, 2)
NETWORK = Network(CONFIG, (2, 3), rows=2)
LOSS = UDMGRPO(TrajectoryPlan(10, 1.0), clip_range=0.2, kl_weight=0.05)


def random_samples(count: int = 8, old: bool = False) -> Samples:
    rng = np.random.default_rng(3)
    draw = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    logp = jnp.asarray(rng.normal(size=count) * 0.1 - 3.7, jnp.float32)
    return Samples(
        prompt_ids=draw(10, count, 4),
        noisy=draw(40, count, 6),
        action=draw(40, count, 6),
        advantage=jnp.asarray(rng.normal(size=count), jnp.float32),
        frozen={"ref_logp": logp} | ({"old_logp": logp + 0.05} if old else {}),
    )

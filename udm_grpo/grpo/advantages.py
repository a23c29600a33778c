"""Group-relative advantages."""

import jax.numpy as jnp
from jaxtyping import Array, Float

STD_EPS = 1e-4
"""Added to the standard deviation; fixed by the method."""


def advantages(score: Float[Array, "p g"], clip: float, global_std: bool = False) -> Float[Array, "p g"]:
    """Return each image's advantage over its prompt's group: (r - mean_group) / (std + 1e-4), clipped to +-`clip`.

    std is the population standard deviation of the group or, with `global_std`, of all P*G scores. In a dead group,
    whose scores are all equal, every advantage is exactly 0, regardless of how the mean rounds.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    dead = jnp.max(score, axis=1, keepdims=True) == jnp.min(score, axis=1, keepdims=True)
    centred = jnp.where(dead, 0.0, score - jnp.mean(score, axis=1, keepdims=True))
    std = jnp.std(score, keepdims=True) if global_std else jnp.std(score, axis=1, keepdims=True)
    return jnp.clip(centred / (std + STD_EPS), -clip, clip)

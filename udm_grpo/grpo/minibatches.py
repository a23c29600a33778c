"""Disjoint minibatches of a rollout: every optimizer step trains on all K states of its own images.

Advantages and old log-probabilities are computed for the whole rollout before the first step. Images are drawn
individually, not as whole groups, so that each step sees nearly all prompts, as in PPO and the public release.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32, Key

from udm_grpo.batches import Samples
from udm_grpo.model.chunks import pad_rows


def split_images(key: Key[Array, ""], images: int, minibatches: int) -> Int32[Array, "m i"]:
    """Return the image indices of each minibatch: a random partition of all B into M equal parts, M * I = B."""
    order = jax.random.permutation(key, jnp.arange(images, dtype=jnp.int32))
    return order.reshape(minibatches, images // minibatches)


def of_images(samples: Samples, chosen: Int[Array, " i"], images: int, states: int, rows: int) -> Samples:
    """Return the states of `chosen` images among the K*B = `states` of a rollout of B = `images`, padded to `rows`.

    Padding repeats the last state with weight 0.
    """
    K = states // images
    index = (jnp.arange(K, dtype=jnp.int32)[:, None] * images + chosen[None, :]).reshape(-1)
    taken = index.shape[0]
    part = jax.tree.map(lambda leaf: leaf[pad_rows(index, rows)], replace(samples, weight=None))
    weight = (jnp.arange(rows) < taken).astype(jnp.float32) if rows > taken else None
    return replace(part, weight=weight)

"""Leave dead groups out of an optimizer step: their states get the weight 0, and whole chunks of them are not computed.

The images of a dead group all have the same score, hence the advantage 0, and contribute only to the KL term. DAPO
(arXiv 2503.14476) leaves such groups out, too, but draws others in their place.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from udm_grpo.batches import BatchSizes, Samples
from udm_grpo.model.chunks import chunk_size, pad_rows

LIVE = "live"
"""Among the frozen values of samples: 1 for a state whose group is live."""


def marked(samples: Samples, weights: Float[Array, "p g"], sizes: BatchSizes) -> Samples:
    """Return the samples with LIVE, for an objective's weights of the images."""
    live = jnp.repeat(jnp.any(weights != 0, axis=1), weights.shape[1]).astype(jnp.float32)
    live = pad_rows(jnp.tile(live, sizes.states // sizes.images), sizes.trained)
    return replace(samples, frozen=samples.frozen | {LIVE: live})


def live_first(samples: Samples, micro_batch: int) -> Samples:
    """Return marked samples, without the mark, in which only live states have a weight and the first chunks hold them.

    Chunks are those of `accumulated_gradients`. If no state is live, all keep their weight, so that metrics are those
    of the rollout; the step is skipped anyhow, for lack of a signal.
    """
    frozen = dict(samples.frozen)
    live = frozen.pop(LIVE)
    present = jnp.ones_like(live) if samples.weight is None else samples.weight
    weight = jnp.where(jnp.any(live * present > 0), live * present, present)
    size = chunk_size(weight.shape[0], micro_batch)
    # `chunks.split` puts the rows j, j + n, ... into chunk j of n.
    order = jnp.argsort(weight == 0, stable=True).reshape(-1, size).T.reshape(-1)
    return jax.tree.map(lambda leaf: leaf[order], replace(samples, frozen=frozen, weight=weight))

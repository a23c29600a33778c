"""Fit the configured batch sizes, of images and of training states, to the mesh.

A batch is spread evenly over the devices, so its size is a multiple of their number. If the configured size is not,
rows are added at the end: images that are drawn and dropped, and training states of weight 0.
"""

from jax.sharding import Mesh

from udm_grpo import mesh as meshes
from udm_grpo.batches import BatchSizes, padded
from udm_grpo.config import RunConfig

MICRO_BATCH = 32
"""Rows at a time where the configuration leaves it open and the memory of a device is unknown."""


def micro_batch(total: int, asked: int, shards: int) -> int:
    """Return how many of `total` rows `shards` devices process at a time, if `asked` is the configured number.

    This is `asked` if that divides `total` and `shards` divides it. Otherwise it is the next multiple of `shards` below
    or above, whichever needs less padding in all (the smaller one if both need the same), evened out over the
    micro-batches.
    """
    asked = min(asked, total)
    below, above = max(asked // shards * shards, shards), padded(asked, shards)
    # As few micro-batches as either needs, all of one size.
    sizes = [padded(-(-total // -(-total // size)), shards) for size in (below, above)]
    return min(sizes, key=lambda size: (padded(total, size), size))


def batch_sizes(config: RunConfig, mesh: Mesh) -> BatchSizes:
    """Return the batch sizes of a run on `mesh`."""
    shards = meshes.batch_shards(mesh)
    images = config.rollout.prompts * config.rollout.group_size
    states = images * config.grpo.trained_steps
    return BatchSizes(
        images=images,
        rollout=micro_batch(images, config.rollout.micro_batch or MICRO_BATCH, shards),
        states=states,
        minibatches=config.grpo.minibatches,
        update=micro_batch(states // config.grpo.minibatches, config.optimizer.micro_batch or MICRO_BATCH, shards),
        evaluation=max(config.evaluation.batch // shards, 1) * shards,
    )

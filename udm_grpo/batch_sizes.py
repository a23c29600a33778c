"""How many images and states are worked through together: what the configuration asks for, fitted to the mesh.

A batch is spread evenly over the devices, so its size is a multiple of their number. Where the configured sizes are
none, rows are added at the end: images that are drawn and dropped, and training states of weight 0.
"""

from jax.sharding import Mesh

from udm_grpo import mesh as meshes
from udm_grpo.batches import BatchSizes, padded
from udm_grpo.config import RunConfig


def micro_batch(total: int, asked: int, shards: int) -> int:
    """Return the rows that `shards` devices work through together, of `total` rows of which `asked` were asked for at a
    time.

    `asked` itself where it fits: where it divides `total` and `shards` divides it. Otherwise the multiple of `shards`
    next to it, below or above, that needs less padding in all (the smaller one if both need the same), evened out over
    the micro-batches.
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
        rollout=micro_batch(images, config.rollout.micro_batch, shards),
        states=states,
        minibatches=config.grpo.minibatches,
        update=micro_batch(states // config.grpo.minibatches, config.optimizer.micro_batch, shards),
        evaluation=max(config.evaluation.batch // shards, 1) * shards,
    )

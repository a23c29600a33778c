"""How many images and states are worked through together: what the configuration asks for, fitted to the mesh.

A batch is spread evenly over the devices, so its size is a multiple of their number. Where the configured sizes are
none, rows are added at the end: images that are drawn and dropped, and training states of weight 0.
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from udm_grpo import mesh as meshes
from udm_grpo.config import RunConfig


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


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


@dataclass(frozen=True)
class BatchSizes:
    """The batches of an iteration and of an evaluation, over all devices together."""

    images: int
    """B, images of an iteration."""
    rollout: int
    """Images that are rolled out and decoded together."""
    states: int
    """S = K*B, training states of an iteration."""
    minibatches: int
    """Parts of the B images, each for an optimizer step of its own."""
    update: int
    """States whose gradients are taken together."""
    evaluation: int
    """Images of an evaluation that are drawn together."""

    @property
    def drawn(self) -> int:
        """Images that are drawn for an iteration: the B, then the padding of the last micro-batch."""
        return padded(self.images, self.rollout)

    @property
    def trained(self) -> int:
        """States of an iteration: the S, then padding of weight 0."""
        return padded(self.states, self.update)

    @property
    def stepped(self) -> int:
        """States of one optimizer step: those of its images, then padding of weight 0."""
        return padded(self.states // self.minibatches, self.update)


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

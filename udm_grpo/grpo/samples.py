"""The training states of a rollout, from its images to the states of one optimizer step, for any objective."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Key

from udm_grpo.batches import BatchSizes, Params, Rollout, Samples
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.grpo.live_groups import live_first, marked
from udm_grpo.grpo.minibatches import of_images
from udm_grpo.grpo.objective import Objective
from udm_grpo.model.chunks import map_chunks, pad_rows
from udm_grpo.model.network import Network


def prepare(
    objective: Objective,
    network: Network,
    sizes: BatchSizes,
    path: ProbabilityPath,
    policy: Params,
    reference: Params,
    prompt_ids: Int32[Array, "b l"],
    rolled: Rollout,
    key: Key[Array, ""],
) -> Samples:
    """Return the training states of a rollout with the objective's frozen values: all an update needs but the scores.

    Padding images beyond the B of an iteration have no states; padding states are copies of the last, of weight 0.
    """
    B, S = sizes.images, sizes.trained
    image_index = jnp.arange(prompt_ids.shape[0], dtype=jnp.int32)
    states = objective.states(path, rolled, image_index, key)
    K = states.noisy.shape[0]
    noisy, action = states.noisy, states.action
    if prompt_ids.shape[0] > B:
        prompt_ids, noisy, action = prompt_ids[:B], noisy[:, :B], action[:, :B]
    noisy, action = (array.reshape(K * B, -1) for array in (noisy, action))
    prompts = jnp.tile(prompt_ids, (K, 1))
    weight = None
    if sizes.states < S:
        prompts, noisy, action = (network.spread(array) for array in pad_rows((prompts, noisy, action), S))
        weight = (jnp.arange(S) < sizes.states).astype(jnp.float32)
    samples = Samples(prompts, noisy, action, advantage=jnp.zeros(S), frozen={})

    def freeze(part: Samples) -> dict[str, Float[Array, "m ..."]]:
        return objective.freeze(network, policy, reference, part)

    return replace(samples, frozen=map_chunks(freeze, samples, sizes.update), weight=weight)


def judged(objective: Objective, sizes: BatchSizes, samples: Samples, score: Float[Array, "p g"]) -> Samples:
    """Return the training states with the weight of each image, repeated over the K steps."""
    repeated = jnp.tile(objective.weights(score).reshape(-1), sizes.states // sizes.images)
    return replace(samples, advantage=pad_rows(repeated, sizes.trained))


def of_step(
    objective: Objective,
    network: Network,
    sizes: BatchSizes,
    samples: Samples,
    score: Float[Array, "p g"],
    images: Int[Array, " i"] | None,
    skip_dead_groups: bool = False,
) -> Samples:
    """Return the weighted states of one optimizer step, of all images or of `images` i32[B/M].

    With `skip_dead_groups`, the states of dead groups have the weight 0; see `live_groups.live_first`.
    """
    samples = judged(objective, sizes, samples, score)
    if images is None and not skip_dead_groups:
        return samples
    if skip_dead_groups:
        samples = marked(samples, objective.weights(score), sizes)
    if images is not None:
        samples = of_images(samples, images, sizes.images, sizes.states, sizes.stepped)
    if skip_dead_groups:
        samples = live_first(samples, sizes.update)
    return jax.tree.map(network.spread, samples)

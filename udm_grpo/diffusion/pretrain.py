"""The pre-training loss of uniform discrete diffusion: predict the clean code at every image position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from udm_grpo.batches import Params
from udm_grpo.diffusion import path as paths
from udm_grpo.diffusion.categorical import uniforms
from udm_grpo.diffusion.denoiser import Denoiser
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.diffusion.schedule import pretraining_time

EMPTY_PROMPT_PROBABILITY = 0.1
"""Fraction of prompts replaced by the empty one, so that the model also learns the unconditional law."""


def cross_entropy(
    network: Denoiser,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    noisy: Int[Array, "b n"],
    clean: Int[Array, "b n"],
) -> Float[Array, ""]:
    """Return the mean cross-entropy (nats) of the clean codes given the noisy ones, over all tokens."""
    logits = network.logits(params, network.features(params, prompt_ids, noisy))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_p, clean[:, :, None], axis=-1))


def corrupt(
    path: ProbabilityPath,
    shift: float,
    prompt_ids: Int[Array, "b l"],
    empty_ids: Int[Array, " l"],
    clean: Int[Array, "b n"],
    key: Key[Array, ""],
) -> tuple[Int[Array, "b l"], Int[Array, "b n"]]:
    """Return (prompts, 10 % of them replaced by the empty one; images, each noised to a random time)."""
    drop_key, time_key, noise_key = jax.random.split(key, 3)
    B, N = clean.shape
    dropped = jax.random.bernoulli(drop_key, EMPTY_PROMPT_PROBABILITY, (B, 1))
    t = pretraining_time(jax.random.uniform(time_key, (B,), jnp.float32), shift)
    at = jnp.repeat(paths.level(path, t), N)
    noisy = paths.add_noise(path, clean.reshape(-1), at, uniforms(noise_key, B * N, 2)).reshape(B, N)
    return jnp.where(dropped, empty_ids[None, :], prompt_ids), noisy


def pretrain_loss(
    network: Denoiser,
    path: ProbabilityPath,
    shift: float,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    empty_ids: Int[Array, " l"],
    clean: Int[Array, "b n"],
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """Return the loss of one batch of prompts and clean codes.

    Source: URSA, arXiv 2510.24717.
    """
    prompts, noisy = corrupt(path, shift, prompt_ids, empty_ids, clean, key)
    return cross_entropy(network, params, prompts, noisy, clean)

"""Token-mean log-probabilities and the UDM-GRPO loss."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from udm_grpo.batches import Params, Samples
from udm_grpo.diffusion.chunks import chunk_size, join, split
from udm_grpo.model.transformer import Execution, TransformerConfig, hidden_states, image_rows


@dataclass(frozen=True)
class LossPlan:
    """The loss's constants; static under jit."""

    grid: tuple[int, int]
    """(h, w), the token grid."""
    clip_range: float = 1e-4
    """eps of the ratio's clip."""
    kl_weight: float = 0.05
    """beta of the KL term."""
    rows: int = 4
    """Images whose logits exist at a time."""


ONE_DEVICE = Execution()


def _row_logits(hidden: Float[Array, "r n d"], kernel: Float[Array, "d v"]) -> Float[Array, "r n v"]:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def head_logps(
    hidden: Float[Array, "s n d"],
    kernel: Float[Array, "d v"],
    action: Int[Array, "s n"],
    rows: int,
    execution: Execution = ONE_DEVICE,
) -> tuple[Float[Array, "s n"], Float[Array, "s n"]]:
    """(log softmax(hidden @ kernel)[action], entropy) of every token, `rows` images at a time.

    No logits are kept for the backward pass, which computes them again chunk by chunk and sums the kernel's gradient
    in float32. Where a batch is spread over devices, each sums its own part of that gradient, and the parts are
    brought together once. The entropy is a metric: no gradient flows through it.
    """
    return _head_logps_forward(hidden, kernel, action, rows, execution)[0]


def _head_logps_forward(
    hidden: Array, kernel: Array, action: Array, rows: int, execution: Execution
) -> tuple[Any, Any]:
    def chunk(work: tuple[Array, Array]) -> tuple[Array, Array]:
        features, target = work
        log_p = jax.nn.log_softmax(_row_logits(features, kernel), axis=-1)
        picked = jnp.take_along_axis(log_p, target[:, :, None], axis=-1)[:, :, 0]
        return picked, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    size = chunk_size(hidden.shape[0], rows)
    out = join(jax.lax.map(chunk, split((hidden, action), size)))
    return out, (hidden, kernel, action)


def _head_logps_backward(
    rows: int, execution: Execution, saved: tuple[Array, Array, Array], cotangent: tuple[Array, Array]
) -> Any:
    hidden, kernel, action = saved
    size = chunk_size(hidden.shape[0], rows)
    parts = execution.shards if size % execution.shards == 0 else 1

    def chunk(kernel_gradient: Array, work: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        features, target, g = work
        p = jax.nn.softmax(_row_logits(features, kernel), axis=-1)
        onehot = jax.nn.one_hot(target, kernel.shape[1], dtype=jnp.float32)
        d_logits = (g[:, :, None] * (onehot - p)).astype(kernel.dtype)
        d_hidden = jnp.einsum("rnv,dv->rnd", d_logits, kernel)
        left, right = (array.reshape(parts, -1, array.shape[-1]) for array in (features, d_logits))
        d_kernel = jnp.einsum("prd,prv->pdv", left, right, preferred_element_type=jnp.float32)
        return kernel_gradient + d_kernel, d_hidden

    start = jnp.zeros((parts, *kernel.shape), jnp.float32)
    start = execution.spread(start) if parts > 1 else start
    kernel_gradient, d_hidden = jax.lax.scan(chunk, start, split((hidden, action, cotangent[0]), size))
    return join(d_hidden), jnp.sum(kernel_gradient, axis=0).astype(kernel.dtype), None


head_logps.defvjp(_head_logps_forward, _head_logps_backward)


def token_mean_logps(
    config: TransformerConfig,
    execution: Execution,
    plan: LossPlan,
    params: Params,
    prompt_ids: Int[Array, "s l"],
    noisy: Int32[Array, "s n"],
    action: Int32[Array, "s n"],
) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
    """(mean over the N tokens of log p(action | noisy), mean entropy), one number each an image.

    A mean, not a sum. Only the N image rows reach the head.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    hidden = hidden_states(config, params, prompt_ids, noisy, plan.grid, execution)
    rows = image_rows(hidden, noisy.shape[1])
    kernel = execution.with_head(params)["lm_head"]["kernel"]
    logp, entropy = head_logps(rows, kernel, action, plan.rows, execution)
    return jnp.mean(logp, axis=1), jnp.mean(entropy, axis=1)


def mean(x: Float[Array, " s"], weight: Float[Array, " s"] | None = None) -> Float[Array, ""]:
    """Return the sum of the states whose weight is not 0, over the number of all states.

    What a state of weight 0 holds has no part in it, not even if it is not finite, and gets no gradient.
    """
    return jnp.mean(x) if weight is None else jnp.sum(jnp.where(weight > 0, weight * x, 0.0)) / x.shape[0]


def policy_loss(
    logp: Float[Array, " s"],
    old_logp: Float[Array, " s"],
    advantage: Float[Array, " s"],
    clip_range: float,
    weight: Float[Array, " s"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (the clipped surrogate -mean min(A r, A clip(r, 1 - eps, 1 + eps)), the fraction of ratios outside the
    clip).

    r = exp(logp - old_logp).

    Source: GRPO, arXiv 2402.03300, with the token-mean ratio of UDM-GRPO.
    """
    ratio = jnp.exp(logp - old_logp)
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    outside = mean((jnp.abs(ratio - 1) > clip_range).astype(jnp.float32), weight)
    return -mean(jnp.minimum(advantage * ratio, advantage * clipped), weight), outside


def k3(
    logp: Float[Array, " s"], ref_logp: Float[Array, " s"], weight: Float[Array, " s"] | None = None
) -> Float[Array, ""]:
    """Return the mean of exp(ref - logp) - (ref - logp) - 1: a KL estimate that is never negative.

    Source: Schulman, "Approximating KL divergence" (2020), estimator k3.
    """
    difference = ref_logp - logp
    return mean(jnp.expm1(difference) - difference, weight)


def grpo_loss(
    config: TransformerConfig, execution: Execution, plan: LossPlan, params: Params, samples: Samples
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(policy loss + beta KL, metrics) over S training states, each a mean over them; see `mean` for weights.

    With `samples.old_logp` None (one update a rollout) the old policy is this one: the ratio is 1 and only its
    gradient acts.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    logp, entropy = token_mean_logps(config, execution, plan, params, samples.prompt_ids, samples.noisy, samples.action)
    old_logp = jax.lax.stop_gradient(logp) if samples.old_logp is None else samples.old_logp
    advantage, ref_logp, weight = samples.advantage, samples.ref_logp, samples.weight
    if weight is not None:  # in the gradient, 0 times what is not finite would not be 0
        advantage = jnp.where(weight > 0, advantage, 0.0)
        old_logp, ref_logp = (jnp.where(weight > 0, x, jax.lax.stop_gradient(logp)) for x in (old_logp, ref_logp))
    policy, clip_fraction = policy_loss(logp, old_logp, advantage, plan.clip_range, weight)
    kl = k3(logp, ref_logp, weight)
    loss = policy + plan.kl_weight * kl
    metrics = {
        "loss": loss,
        "policy_loss": policy,
        "kl": kl,
        "entropy": mean(entropy, weight),
        "logp": mean(logp, weight),
        "clip_fraction": clip_fraction,
    }
    return loss, metrics

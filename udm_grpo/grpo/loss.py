"""Token-mean log-probabilities and the UDM-GRPO loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from udm_grpo.batches import Params, Samples
from udm_grpo.model.head import head_logps
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

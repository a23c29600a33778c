"""The UDM-GRPO objective: advantages in groups, token-mean log-probabilities, the clipped surrogate and its KL."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Key

from udm_grpo.batches import Params, Rollout, Samples, Trajectory
from udm_grpo.config import RunConfig
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.grpo.advantages import advantages
from udm_grpo.grpo.trajectory import TrajectoryPlan, trajectory
from udm_grpo.model.network import Network


def token_mean_logps(
    network: Network,
    params: Params,
    prompt_ids: Int[Array, "s l"],
    noisy: Int32[Array, "s n"],
    action: Int32[Array, "s n"],
) -> tuple[Float[Array, " s"], Float[Array, " s"]]:
    """(mean over the N tokens of log p(action | noisy), mean entropy), one number each an image.

    A mean, not a sum.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    logp, entropy = network.log_probs(params, prompt_ids, noisy, action)
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


@dataclass(frozen=True)
class UDMGRPO:
    """The objective of UDM-GRPO; see objective.py for what each method is for.

    Source: arXiv 2604.18518.
    """

    trajectory: TrajectoryPlan
    clip_range: float = 1e-4
    """eps of the ratio's clip."""
    kl_weight: float = 0.05
    """beta of the KL term."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    global_std: bool = False
    """Whether the std of all scores divides an advantage, instead of the group's."""
    keeps_old: bool = False
    """Whether there are several optimizer steps a rollout, whose ratios are to the policy before the first."""

    @classmethod
    def from_config(cls, config: RunConfig, shift: float, rows: int) -> "UDMGRPO":
        """Return the objective of a run, by its `grpo` section."""
        given = config.grpo
        return cls(
            trajectory=TrajectoryPlan(
                steps=config.rollout.steps,
                shift=shift,
                trained_steps=given.trained_steps,
                window_starts=given.window_starts,
                trajectory=given.trajectory,
                action=given.action,
                rows=rows,
            ),
            clip_range=given.clip_range,
            kl_weight=given.kl_weight,
            advantage_clip=given.advantage_clip,
            global_std=given.global_std,
            keeps_old=given.optimizer_steps > 1,
        )

    @property
    def needs_rollout(self) -> bool:
        """Whether rollouts have to keep what they met at every step: for the ablations."""
        return self.trajectory.needs_rollout

    def states(
        self, path: ProbabilityPath, rollout: Rollout, image_index: Int[Array, " b"], key: Key[Array, ""]
    ) -> Trajectory:
        """Return the K training states of each of B images."""
        return trajectory(path, self.trajectory, rollout, image_index, key)

    def freeze(
        self, network: Network, policy: Params, reference: Params, samples: Samples
    ) -> dict[str, Float[Array, " m"]]:
        """Return `ref_logp`, token-mean log-probabilities under the start model, and with several optimizer steps
        `old_logp`, those under the policy that drew the images.
        """
        models = {"ref_logp": reference} | ({"old_logp": policy} if self.keeps_old else {})
        states = (samples.prompt_ids, samples.noisy, samples.action)
        return {name: token_mean_logps(network, params, *states)[0] for name, params in models.items()}

    def weights(self, score: Float[Array, "p g"]) -> Float[Array, "p g"]:
        """Return the group-relative advantages."""
        return advantages(score, self.advantage_clip, self.global_std)

    def loss(
        self, network: Network, params: Params, samples: Samples
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(policy loss + beta KL, metrics) over S training states, each a mean over them; see `mean` for weights.

        Without `old_logp` (one update a rollout) the old policy is this one: the ratio is 1 and only its gradient acts.
        """
        logp, entropy = token_mean_logps(network, params, samples.prompt_ids, samples.noisy, samples.action)
        old_logp = samples.frozen.get("old_logp", jax.lax.stop_gradient(logp))
        advantage, ref_logp, weight = samples.advantage, samples.frozen["ref_logp"], samples.weight
        if weight is not None:  # in the gradient, 0 times what is not finite would not be 0
            advantage = jnp.where(weight > 0, advantage, 0.0)
            old_logp, ref_logp = (jnp.where(weight > 0, x, jax.lax.stop_gradient(logp)) for x in (old_logp, ref_logp))
        policy, clip_fraction = policy_loss(logp, old_logp, advantage, self.clip_range, weight)
        kl = k3(logp, ref_logp, weight)
        loss = policy + self.kl_weight * kl
        metrics = {
            "loss": loss,
            "policy_loss": policy,
            "kl": kl,
            "entropy": mean(entropy, weight),
            "logp": mean(logp, weight),
            "clip_fraction": clip_fraction,
        }
        return loss, metrics

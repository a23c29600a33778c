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
    """Return (mean, not sum, over the N tokens of log p(action | noisy), mean entropy), one number each per state.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    logp, entropy = network.log_probs(params, prompt_ids, noisy, action)
    return jnp.mean(logp, axis=1), jnp.mean(entropy, axis=1)


def mean(x: Float[Array, " s"], weight: Float[Array, " s"] | None = None) -> Float[Array, ""]:
    """Return the weighted sum over the states, divided by the number of all states.

    Values of states with weight 0 are ignored, even if they are not finite, and get no gradient.
    """
    return jnp.mean(x) if weight is None else jnp.sum(jnp.where(weight > 0, weight * x, 0.0)) / x.shape[0]


def policy_loss(
    logp: Float[Array, " s"],
    old_logp: Float[Array, " s"],
    advantage: Float[Array, " s"],
    clip_range: float,
    weight: Float[Array, " s"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (clipped surrogate -mean min(A r, A clip(r, 1 - eps, 1 + eps)), fraction of ratios outside the clip).

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
    """The objective of UDM-GRPO; objective.py documents the methods.

    Source: arXiv 2604.18518.
    """

    trajectory: TrajectoryPlan
    clip_range: float = 1e-4
    """eps, at which the ratio is clipped."""
    kl_weight: float = 0.05
    """beta, the weight of the KL term."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    global_std: bool = False
    """Whether advantages are divided by the std of all scores instead of the group's."""
    keeps_old: bool = False
    """Whether a rollout has several optimizer steps, whose ratios are relative to the policy before the first."""

    @classmethod
    def from_config(cls, config: RunConfig, shift: float, rows: int) -> "UDMGRPO":
        """Return the objective that the `grpo` section of a config describes."""
        settings = config.grpo
        return cls(
            trajectory=TrajectoryPlan(
                steps=config.rollout.steps,
                shift=shift,
                trained_steps=settings.trained_steps,
                window_starts=settings.window_starts,
                trajectory=settings.trajectory,
                action=settings.action,
                rows=rows,
            ),
            clip_range=settings.clip_range,
            kl_weight=settings.kl_weight,
            advantage_clip=settings.advantage_clip,
            global_std=settings.global_std,
            keeps_old=settings.optimizer_steps > 1,
        )

    @property
    def needs_rollout(self) -> bool:
        """Whether rollouts must keep x_k and x_1 of every step, for the ablations."""
        return self.trajectory.needs_rollout

    def states(
        self, path: ProbabilityPath, rollout: Rollout, image_index: Int[Array, " b"], key: Key[Array, ""]
    ) -> Trajectory:
        """Return the K training states of each of B images."""
        return trajectory(path, self.trajectory, rollout, image_index, key)

    def freeze(
        self, network: Network, policy: Params, reference: Params, samples: Samples
    ) -> dict[str, Float[Array, " m"]]:
        """Return token-mean log-probabilities under the start model, `ref_logp`.

        With several optimizer steps, also return `old_logp`, those under the policy that drew the images.
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
        """Return (policy loss + beta KL, metrics), all means over S training states; see `mean` for weights.

        Without `old_logp` (one update per rollout) the old policy is the current one: the ratio is 1, with a gradient.
        """
        logp, entropy = token_mean_logps(network, params, samples.prompt_ids, samples.noisy, samples.action)
        old_logp = samples.frozen.get("old_logp", jax.lax.stop_gradient(logp))
        advantage, ref_logp, weight = samples.advantage, samples.frozen["ref_logp"], samples.weight
        if weight is not None:  # in the gradient, 0 times a non-finite value would not be 0
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

"""Reward-weighted likelihood: the example of README.md as a part of the project."""

from dataclasses import dataclass

import jax.numpy as jnp

from udm_grpo.grpo.loss import mean, token_mean_logps
from udm_grpo.grpo.trajectory import TrajectoryPlan, trajectory


@dataclass(frozen=True)
class BestOfGroup:
    """Raises the likelihood of the images that are better than their group, and lowers none."""

    plan: TrajectoryPlan
    needs_rollout = False  # the states need the final images only

    @classmethod
    def from_config(cls, config, shift, rows):
        steps = (config.grpo.trained_steps, config.grpo.window_starts)
        return cls(TrajectoryPlan(config.rollout.steps, shift, *steps, rows=rows))

    def states(self, path, rollout, image_index, key):
        return trajectory(path, self.plan, rollout, image_index, key)

    def freeze(self, network, policy, reference, samples):
        return {}  # nothing; UDM-GRPO keeps log-probabilities of the reference here

    def weights(self, score):
        return jnp.maximum(score - jnp.mean(score, axis=1, keepdims=True), 0.0)

    def loss(self, network, params, samples):
        logp, _ = token_mean_logps(network, params, samples.prompt_ids, samples.noisy, samples.action)
        loss = -mean(samples.advantage * logp, samples.weight)
        return loss, {"loss": loss, "logp": mean(logp, samples.weight)}

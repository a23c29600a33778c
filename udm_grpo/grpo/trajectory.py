"""The states that an update trains on: which steps, the model's input at each, and the action whose log-prob counts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from udm_grpo.batches import Rollout, Trajectory
from udm_grpo.diffusion import path as paths
from udm_grpo.diffusion.categorical import uniforms
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.diffusion.rollout import image_keys
from udm_grpo.diffusion.schedule import timesteps
from udm_grpo.model.chunks import map_chunks


@dataclass(frozen=True)
class TrajectoryPlan:
    """How training states are constructed; static under jit."""

    steps: int
    """T of the rollout."""
    shift: float
    """s of the schedule."""
    trained_steps: int = 3
    """K consecutive steps."""
    window_starts: int = 3
    """The window's first step is drawn uniformly from [0, window_starts)."""
    trajectory: str = "forward"
    """"forward" (the method): x_k is the final image noised to t_k; "rollout" (ablation): the rollout's own x_k."""
    action: str = "clean"
    """"clean" (the method): the rollout's final tokens; "intermediate" (ablation): the x_1 drawn at step k."""
    rows: int = 4
    """Images to noise at a time."""

    @property
    def needs_rollout(self) -> bool:
        """Whether the rollout must keep x_k and x_1 of every step."""
        return self.trajectory == "rollout" or self.action == "intermediate"


def window(plan: TrajectoryPlan, key: Key[Array, ""]) -> Int32[Array, " k"]:
    """Return the K consecutive steps of this update, the same on every device."""
    start = jax.random.randint(key, (), 0, plan.window_starts, jnp.int32)
    return start + jnp.arange(plan.trained_steps, dtype=jnp.int32)


def noised(
    path: ProbabilityPath,
    plan: TrajectoryPlan,
    clean: Int32[Array, "b n"],
    at: Float[Array, ""],
    step: Int[Array, ""],
    keys: Key[Array, " b"],
) -> Int32[Array, "b n"]:
    """Draw x_k ~ p_t(. | clean) for every image; the draws depend only on its own key and the step."""
    tokens = clean.shape[1]
    u = jax.vmap(lambda key: uniforms(jax.random.fold_in(key, step), tokens, 2))(keys)

    def chunk(work: dict[str, Array]) -> Int32[Array, "r n"]:
        x_1 = work["clean"].reshape(-1)
        return paths.add_noise(path, x_1, at * jnp.ones(x_1.shape), work["u"].reshape(-1, 2)).reshape(-1, tokens)

    return map_chunks(chunk, {"clean": clean, "u": u}, plan.rows)


def trajectory(
    path: ProbabilityPath, plan: TrajectoryPlan, rollout: Rollout, image_index: Int[Array, " b"], key: Key[Array, ""]
) -> Trajectory:
    """Return the K training states of each of B images.

    Raises ValueError if an ablation needs the rollout's own trajectory and it was not kept.

    Source: UDM-GRPO, arXiv 2604.18518 (clean action, forward trajectory, reduced step).
    """
    window_key, noise_key = jax.random.split(key)
    steps = window(plan, window_key)
    visited, predicted = rollout.visited, rollout.predicted
    if plan.needs_rollout and (visited is None or predicted is None):
        raise ValueError("this ablation trains on the rollout's own steps: keep its trajectory.")
    if plan.trajectory == "rollout":
        noisy = visited[steps]  # type: ignore[index]
    else:
        levels = jnp.asarray(np.asarray(paths.level(path, timesteps(plan.steps, plan.shift)), np.float32))[steps]
        keys = image_keys(noise_key, image_index)
        noisy = jax.lax.map(lambda at: noised(path, plan, rollout.clean, at[0], at[1], keys), (levels, steps))
    clean = jnp.broadcast_to(rollout.clean, noisy.shape)
    action = predicted[steps] if plan.action == "intermediate" else clean  # type: ignore[index]
    return Trajectory(noisy=noisy, action=action)

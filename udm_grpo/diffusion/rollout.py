"""The denoising rollout: a `lax.scan` from uniform codes to an image, whose outputs are the trajectory."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key

from udm_grpo.batches import Params, Rollout
from udm_grpo.diffusion import path as paths
from udm_grpo.diffusion.categorical import categorical, uniforms
from udm_grpo.diffusion.denoiser import Denoiser
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.diffusion.schedule import timesteps


@dataclass(frozen=True)
class RolloutPlan:
    """The settings of a rollout; static under jit."""

    steps: int = 10
    """T, the number of steps."""
    shift: float = 1.0
    """s of the schedule."""
    guidance_scale: float = 1.0
    """g of classifier-free guidance (CFG); 1 turns it off."""
    guidance_trunc: float = 0.9
    """Guidance is applied while t_k is below this."""
    keep_trajectory: bool = False
    """Whether to return x_k and x_1 of every step, for the ablations."""

    def first_step(self, path: ProbabilityPath) -> int:
        """Return 0, or 1 if step 0 cannot change a token and its prediction is not requested."""
        return 1 if path.still_at_zero and not self.keep_trajectory and self.steps > 1 else 0

    def guided(self) -> np.ndarray:
        """Return the steps at which guidance is applied, bool[T]."""
        return (timesteps(self.steps, self.shift) < self.guidance_trunc) & (self.guidance_scale > 1)


def image_keys(key: Key[Array, ""], image_index: Int[Array, " b"]) -> Key[Array, " b"]:
    """Return a key for each image from its global index, so that no draw depends on micro-batches or devices."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(image_index)


def start_tokens(path: ProbabilityPath, keys: Key[Array, " b"], tokens: int) -> Int32[Array, "b n"]:
    """Draw uniform random codes."""
    return jax.vmap(lambda key: jax.random.randint(key, (tokens,), 0, path.codes, jnp.int32))(keys)


def sample_step(
    path: ProbabilityPath,
    logits: Float[Array, "r v"],
    z: Int[Array, " r"],
    times: dict[str, Array],
    u: Float[Array, "r 5"],
) -> tuple[Int32[Array, " r"], Int32[Array, " r"]]:
    """Return (next codes, drawn x_1) after one step of the sampler for R tokens, given logits of x_1.

    `times` contains the scalars level, rate, dt and last (bool): the last step returns x_1 itself.
    """
    x_1 = categorical(logits, u[:, :2])
    moved = paths.step(path, z, x_1, times["level"], times["rate"], times["dt"], u[:, 2:])
    return jnp.where(times["last"], x_1, moved), x_1


def step_times(path: ProbabilityPath, plan: RolloutPlan) -> dict[str, np.ndarray]:
    """Return level, rate, dt, last and index of each of the T steps, computed in float64."""
    t = timesteps(plan.steps, plan.shift)
    return {
        "level": np.asarray(paths.level(path, t), np.float32),
        "rate": np.asarray(paths.rate(path, t), np.float32),
        "dt": np.diff(t, append=1.0).astype(np.float32),
        "last": np.arange(plan.steps) == plan.steps - 1,
        "index": np.arange(plan.steps, dtype=np.int32),
    }


def denoise(
    network: Denoiser,
    path: ProbabilityPath,
    plan: RolloutPlan,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    empty_ids: Int[Array, " l"],
    keys: Key[Array, " b"],
    x: Int32[Array, "b n"],
    times: dict[str, Array],
    guided: bool,
) -> tuple[Int32[Array, "b n"], Int32[Array, "b n"]]:
    """Run one step for B images: features of all tokens, then logits and draws for a few images at a time."""
    params = network.with_head(params)
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, times["index"] + 1))(keys)
    u = jax.vmap(lambda key: uniforms(key, x.shape[1], 5))(step_keys)
    work = {"cond": network.features(params, prompt_ids, x), "x": x, "u": u}
    if guided:
        work["uncond"] = network.features(params, jnp.broadcast_to(empty_ids, prompt_ids.shape), x)

    def draw(chunk: dict[str, Array]) -> tuple[Int32[Array, "r n"], Int32[Array, "r n"]]:
        logits = network.logits(params, chunk["cond"])
        if guided:
            uncond = network.logits(params, chunk["uncond"])
            logits = uncond + plan.guidance_scale * (logits - uncond)
        after, x_1 = sample_step(
            path, logits.reshape(-1, path.codes), chunk["x"].reshape(-1), times, chunk["u"].reshape(-1, 5)
        )
        return after.reshape(chunk["x"].shape), x_1.reshape(chunk["x"].shape)

    after, x_1 = network.in_chunks(draw, work)
    return after, x_1


def rollout(
    network: Denoiser,
    path: ProbabilityPath,
    plan: RolloutPlan,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    empty_ids: Int[Array, " l"],
    image_index: Int[Array, " b"],
    key: Key[Array, ""],
) -> Rollout:
    """Denoise B images from uniform codes in T steps.

    `image_index` identifies the images across micro-batches, devices and hosts; with `key` it determines every draw. On
    the metric path nothing moves at t = 0, so step 0 is skipped unless its prediction is requested: T - 1 forward
    passes.

    Source: URSA, arXiv 2510.24717; UDM-GRPO, arXiv 2604.18518.
    """
    keys = image_keys(key, image_index)
    start_keys = jax.vmap(lambda image_key: jax.random.fold_in(image_key, 0))(keys)
    x = start_tokens(path, start_keys, network.tokens)
    first = plan.first_step(path)
    times = {name: value[first:] for name, value in step_times(path, plan).items()}
    guided = plan.guided()[first:]
    parts = []
    # Times increase, so the guided steps come first: at most two scans, each with one kind of step as its body.
    for flag in (True, False):
        mine = guided == flag
        if not mine.any():
            continue

        def body(x: Array, now: dict[str, Array], flag: bool = flag) -> tuple[Array, tuple[Array, Array] | None]:
            after, x_1 = denoise(network, path, plan, params, prompt_ids, empty_ids, keys, x, now, flag)
            return after, (x, x_1) if plan.keep_trajectory else None

        x, kept = jax.lax.scan(body, x, {name: jnp.asarray(value[mine]) for name, value in times.items()})
        parts.append(kept)
    if not plan.keep_trajectory:
        return Rollout(clean=x)
    visited, predicted = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Rollout(clean=x, visited=visited, predicted=predicted)

"""The probability path from uniform noise to a clean image, and the jump process that follows it.

Two families: the metric path, which moves through similar-looking codes (URSA), and the mixture path, which keeps or
replaces a token. All functions work on R independent tokens; callers bound R, since arrays of shape (R, V) occur.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from udm_grpo.diffusion.categorical import categorical

DEFAULT_EPS = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProbabilityPath:
    """p_t(x | x_1): the metric path softmax_x(-beta_t d(x, x_1)) if `alpha` is a number, the mixture path if None.

    d is the squared L2 distance of codebook rows and beta_t = c (t / (1 - t))^alpha.

    Source: arXiv 2412.03487; URSA, arXiv 2510.24717.
    """

    codebook: Float[Any, "v e"]
    """L2-normalised rows; an array, or only its shape if programs are compiled without being run."""
    alpha: float | None = field(metadata={"static": True})
    c: float = field(metadata={"static": True})

    @property
    def codes(self) -> int:
        """V, the number of codes."""
        return self.codebook.shape[0]

    @property
    def still_at_zero(self) -> bool:
        """Whether no token can move at t = 0, so that the first step of a rollout changes nothing."""
        return self.alpha is not None


def make_path(
    codebook: Float[Array, "v e"], alpha: float | None, c: float, eps: float = DEFAULT_EPS
) -> ProbabilityPath:
    """Return a path over the codes of `codebook`, whose rows this normalises (norms are at least `eps`)."""
    rows = jnp.asarray(codebook, jnp.float32)
    norm = jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), eps)
    return ProbabilityPath(codebook=rows / norm, alpha=alpha, c=c)


def level(path: ProbabilityPath, t: Any) -> Any:
    """Return the progress of the path at time t in [0, 1): beta_t on the metric path, t on the mixture path.

    Accepts NumPy arrays (computing in their precision) and JAX arrays.
    """
    if path.alpha is None:
        return t
    return path.c * (t / (1 - t)) ** path.alpha


def rate(path: ProbabilityPath, t: Any) -> Any:
    """Return the velocity's factor at time t: beta'_t (0 at t = 0) on the metric path, else 1 / (1 - t)."""
    if path.alpha is None:
        return 1 / (1 - t)
    xp = jnp if isinstance(t, jax.Array) else np
    positive = xp.where(t > 0, t, 1)
    slope = path.c * path.alpha * positive ** (path.alpha - 1) / (1 - t) ** (path.alpha + 1)
    return xp.where(t > 0, slope, 0)


def distances(path: ProbabilityPath, x_1: Int[Array, " r"]) -> Float[Array, "r v"]:
    """Return d(x, x_1) for every code x: squared L2 distances of the normalised rows, in float32."""
    rows = path.codebook[x_1]
    product = jnp.matmul(rows, path.codebook.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(path.codebook**2, axis=-1)
    return jnp.maximum(square[x_1][:, None] + square[None, :] - 2 * product, 0)


def noise_log_weights(path: ProbabilityPath, x_1: Int[Array, " r"], at: Float[Array, " r"]) -> Float[Array, "r v"]:
    """Return log p_t(x | x_1) up to a constant per row, for `at` = level(t) of each token."""
    if path.alpha is not None:
        return -at[:, None] * distances(path, x_1)
    other = (1 - at) / path.codes
    here = jnp.arange(path.codes)[None, :] == x_1[:, None]
    return jnp.log(jnp.where(here, (at + other)[:, None], other[:, None]))


def add_noise(
    path: ProbabilityPath, x_1: Int[Array, " r"], at: Float[Array, " r"], u: Float[Array, "r 2"]
) -> Int32[Array, " r"]:
    """Draw from the forward process x_t ~ p_t(. | x_1), with uniform numbers `u`; `at` = level(t) of each token."""
    return categorical(noise_log_weights(path, x_1, at), u)


def velocity(
    path: ProbabilityPath, z: Int[Array, " r"], x_1: Int[Array, " r"], at: Float[Array, " r"], slope: Float[Array, " r"]
) -> Float[Array, "r v"]:
    """Return u_t(x, z | x_1), the rate of jumps from z to x, 0 at x = z; `at` = level(t), `slope` = rate(t) per token.

    Written out for reference and tests; the sampler needs only its sums (`exit_rate`).

    Source: arXiv 2412.03487, kinetic optimal velocity.
    """
    if path.alpha is None:
        onehot = (jnp.arange(path.codes)[None, :] == x_1[:, None]).astype(jnp.float32)
        return jnp.where((z == x_1)[:, None], 0, onehot * slope[:, None])
    d = distances(path, x_1)
    d_z = jnp.take_along_axis(d, z[:, None], axis=1)
    return jax.nn.softmax(-at[:, None] * d, axis=-1) * slope[:, None] * jnp.maximum(d_z - d, 0)


def exit_rate(
    path: ProbabilityPath, z: Int[Array, " r"], x_1: Int[Array, " r"], at: Float[Array, " r"], slope: Float[Array, " r"]
) -> tuple[Float[Array, " r"], Float[Array, "r v"]]:
    """Return (lambda = sum over x != z of u_t(x, z | x_1), log-weights of a jump's target).

    -beta d <= 0 with equality at x_1, so both sums are safe without a softmax: lambda = beta' S / Z with
    Z = sum exp(-beta d) and S = sum exp(-beta d) max(d(z, x_1) - d, 0), in float32.
    """
    if path.alpha is None:
        onehot = jnp.arange(path.codes)[None, :] == x_1[:, None]
        return jnp.where(z == x_1, 0, slope), jnp.where(onehot, 0.0, -jnp.inf)
    d = distances(path, x_1)
    gain = jnp.maximum(jnp.take_along_axis(d, z[:, None], axis=1) - d, 0)
    weight = jnp.exp(-at[:, None] * d)
    total = slope * jnp.sum(weight * gain, axis=-1) / jnp.sum(weight, axis=-1)
    return total, jnp.log(gain) - at[:, None] * d


def step(
    path: ProbabilityPath,
    z: Int[Array, " r"],
    x_1: Int[Array, " r"],
    at: Float[Array, ""],
    slope: Float[Array, ""],
    dt: Float[Array, ""],
    u: Float[Array, "r 3"],
) -> Int32[Array, " r"]:
    """Move each token from z by one time step: it jumps with probability 1 - exp(-dt lambda), else it stays.

    `at` = level(t), `slope` = rate(t); `u` are uniform numbers: column 0 decides whether to jump, 1 and 2 where to.

    Source: URSA, arXiv 2510.24717, sampler.
    """
    every = jnp.ones(z.shape, jnp.float32)
    total, log_weights = exit_rate(path, z, x_1, at * every, slope * every)
    jumps = (u[:, 0] < -jnp.expm1(-dt * total)) & (total > 0)
    # A row that cannot jump may have no finite weight; then staying gets the only one.
    stays = jnp.arange(path.codes)[None, :] == z[:, None]
    target = categorical(jnp.where((total > 0)[:, None], log_weights, jnp.where(stays, 0.0, -jnp.inf)), u[:, 1:])
    return jnp.where(jumps, target, z.astype(jnp.int32))

"""The times of a rollout and of pre-training."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def timesteps(steps: int, shift: float) -> np.ndarray:
    """Return the times t_k, k = 0..T-1, of a rollout with T = `steps`: f64[T], increasing from 0.

    sigma_k = 1 - k/T and t_k = 1 - s*sigma_k / (1 + (s - 1)*sigma_k) with s = `shift`.

    Source: URSA, arXiv 2510.24717.
    """
    if steps < 1:
        raise ValueError(f"a rollout has {steps} steps; it needs at least 1.")
    sigma = 1.0 - np.arange(steps, dtype=np.float64) / steps
    return 1.0 - shift * sigma / (1.0 + (shift - 1.0) * sigma)


def pretraining_time(u: Float[Array, "*b"], shift: float) -> Float[Array, "*b"]:
    """Return times for uniform draws `u` in [0, 1]: the same warp with sigma = 1 - 0.999*u.

    Source: URSA, arXiv 2510.24717.
    """
    sigma = 1.0 - 0.999 * u
    return jnp.asarray(1.0 - shift * sigma / (1.0 + (shift - 1.0) * sigma), u.dtype)

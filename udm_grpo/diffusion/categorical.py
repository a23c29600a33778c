"""Exact draws from categorical distributions over very many codes, with few random numbers.

A naive draw needs one random number per code (V = 131072 per token). Here a draw takes two: it selects a tile of 512
codes by the tile's total weight, then a code inside that tile; the product of the two laws is the exact law.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

TILE = 512
"""Codes per tile. Powers of two near sqrt(V) read the least memory; 512 suits V = 64000 and 131072."""


def _draw(weights: Float[Array, "r v"], u: Float[Array, " r"]) -> Int32[Array, " r"]:
    """Invert the cumulative sum of non-negative `weights` at `u` in [0, 1); an entry of weight 0 is never drawn."""
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1:]
    # u * total may round up to total itself, past the last entry with positive weight.
    threshold = jnp.minimum(u[:, None] * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative <= threshold, axis=-1, dtype=jnp.int32)


def categorical(log_weights: Float[Array, "r v"], u: Float[Array, "r 2"]) -> Int32[Array, " r"]:
    """Draw once per row from softmax(log_weights), with the uniform numbers `u` in [0, 1).

    Entries may be -inf, but a row must have a finite one. Computed in float32, as bfloat16 sums distort the law.
    """
    log_weights = log_weights.astype(jnp.float32)
    rows, codes = log_weights.shape
    if codes <= TILE:
        peak = jnp.max(log_weights, axis=-1, keepdims=True)
        return _draw(jnp.exp(log_weights - peak), u[:, 0])
    tiles = -(-codes // TILE)
    padding = ((0, 0), (0, tiles * TILE - codes))
    tiled = jnp.pad(log_weights, padding, constant_values=-jnp.inf).reshape(rows, tiles, TILE)
    peak = jnp.max(tiled, axis=-1)
    peak = jnp.where(jnp.isfinite(peak), peak, jnp.finfo(jnp.float32).min)  # all of a tile may be -inf
    mass = jnp.log(jnp.sum(jnp.exp(tiled - peak[:, :, None]), axis=-1)) + peak
    tile = _draw(jnp.exp(mass - jnp.max(mass, axis=-1, keepdims=True)), u[:, 0])
    inside = jnp.take_along_axis(tiled, tile[:, None, None], axis=1)[:, 0]
    inside_peak = jnp.take_along_axis(peak, tile[:, None], axis=1)
    return tile * TILE + _draw(jnp.exp(inside - inside_peak), u[:, 1])


def uniforms(key: Array, rows: int, columns: int) -> Float[Array, "r c"]:
    """Return float32 uniform numbers in [0, 1)."""
    return jax.random.uniform(key, (rows, columns), jnp.float32)

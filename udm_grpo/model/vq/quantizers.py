"""The three quantizers of AutoencoderVQ: latents to integer codes, and codes to vectors.

Letters: B images, h x w tokens, e channels of a code, V codes. All ids are int32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FSQ_LEVELS = (8, 8, 8, 5, 5, 5)
FSQ_EPS = 1e-3
MAX_SIMILARITIES = 2**26
"""Largest number of (latent, code) products held at once: 256 MB in float32."""


def vq_ids(z: Float[Array, "b h w e"], codebook: Float[Array, "v e"]) -> Int[Array, "b h w"]:
    """Return the first code with the largest dot product; nothing is normalised.

    Beyond MAX_SIMILARITIES products the latents are taken in chunks.
    Source: index backpropagation quantization, arXiv 2412.02692, section 3.
    """
    rows = z.reshape(-1, z.shape[-1])
    chunk = max(1, MAX_SIMILARITIES // codebook.shape[0])
    if rows.shape[0] <= chunk:
        ids = jnp.argmax(rows @ codebook.T, axis=-1)
    else:
        ids = jax.lax.map(lambda row: jnp.argmax(codebook @ row), rows, batch_size=chunk)
    return ids.astype(jnp.int32).reshape(z.shape[:-1])


def lfq_ids(z: Float[Array, "b h w e"]) -> Int[Array, "b h w"]:
    """Return the codes whose bits are z > 0, first channel most significant.

    Source: lookup-free quantization, arXiv 2310.05737, equation 3.
    """
    weights = _row([2**power for power in reversed(range(z.shape[-1]))])
    return jnp.sum((z > 0).astype(jnp.int32) * weights, axis=-1, dtype=jnp.int32)


def lfq_vectors(ids: Int[Array, "b h w"], dim: int) -> Float[Array, "b h w e"]:
    """Return 2*bit - 1 for each of the `dim` bits of the codes, float32."""
    bits = (ids.astype(jnp.int32)[..., None] >> _row(list(reversed(range(dim))))) & 1
    return (2 * bits - 1).astype(jnp.float32)


def fsq_ids(z: Float[Array, "b h w 6"]) -> Int[Array, "b h w"]:
    """Return the codes of latents, each channel bounded to its number of levels and rounded.

    Source: finite scalar quantization, arXiv 2309.15505, section 3.1 and its appendix.
    """
    half_widths = [(levels - 1) * (1 + FSQ_EPS) / 2 for levels in FSQ_LEVELS]
    offsets = [0.5 if levels % 2 == 0 else 0.0 for levels in FSQ_LEVELS]
    shifts = [math.atanh(offset / half) for offset, half in zip(offsets, half_widths, strict=True)]
    bounded = jnp.tanh(z + _row(shifts, z.dtype)) * _row(half_widths, z.dtype) - _row(offsets, z.dtype)
    digits = jnp.round(bounded).astype(jnp.int32) + _row(FSQ_LEVELS) // 2
    return jnp.sum(digits * _row(_fsq_basis()), axis=-1, dtype=jnp.int32)


def fsq_vectors(ids: Int[Array, "b h w"]) -> Float[Array, "b h w 6"]:
    """Return the codes' levels, from about -1 to 1 in every channel, float32."""
    half = _row(FSQ_LEVELS) // 2
    digits = ids.astype(jnp.int32)[..., None] // _row(_fsq_basis()) % _row(FSQ_LEVELS)
    return (digits - half).astype(jnp.float32) / half.astype(jnp.float32)


def _fsq_basis() -> tuple[int, ...]:
    """Return what one level of each channel adds to the code."""
    return tuple(math.prod(FSQ_LEVELS[:index]) for index in range(len(FSQ_LEVELS)))


def _row(values: list[int] | list[float] | tuple[int, ...], dtype: Any = jnp.int32) -> Array:
    """Return per-channel constants, shaped to meet [B, h, w, e]."""
    return jnp.array(values, dtype)[None, None, None, :]

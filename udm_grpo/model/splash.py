"""Attention with JAX's splash kernel, for TPUs: attention scores are never written to memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

LANES = 128
"""The kernel requires sequence lengths that are multiples of this."""
MAX_BLOCK = 512
"""Maximum rows of a block; not tuned."""


def attend(
    q: Float[Array, "b s heads c"],
    k: Float[Array, "b s kv c"],
    v: Float[Array, "b s kv c"],
    rows: int | None = None,
    batch: Any = None,
    interpret: bool = False,
) -> Float[Array, "b s heads c"]:
    """Return softmax(q k / sqrt(c)) v over the first `rows` keys (None: all); head i reads kv head i // (heads / kv).

    The sequence is padded to a multiple of LANES, and only padding is masked. `batch` is the sharding of the first
    axis, needed because the compiler cannot partition a kernel. `interpret` runs it without a TPU, slowly.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """
    rows = q.shape[1] if rows is None else rows
    if batch is None:
        return _attend(q, k, v, rows, interpret)
    divided = jax.shard_map(
        lambda q, k, v: _attend(q, k, v, rows, interpret),
        mesh=batch.mesh,
        in_specs=batch.spec,
        out_specs=batch.spec,
        check_vma=False,
    )
    return divided(q, k, v)


def _attend(q: Array, k: Array, v: Array, rows: int, interpret: bool) -> Array:
    S, heads, c = q.shape[1:]
    padded = -(-S // LANES) * LANES
    block = max(size for size in range(LANES, min(padded, MAX_BLOCK) + 1, LANES) if padded % size == 0)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((padded, padded))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask=mask,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    # Padded queries attend like the others and are dropped; padded keys form another segment, attended to by no query.
    padding = (np.arange(padded) >= rows).astype(np.int32)
    segments = splash_attention_kernel.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=jnp.asarray(padding))
    ready = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - S), (0, 0)))
        for x in (q * jnp.asarray(c**-0.5, q.dtype), k, v)
    )
    mixed = jax.vmap(lambda *one: kernel(*one, segment_ids=segments))(*ready)
    return jnp.swapaxes(mixed[:, :, :S], 1, 2).astype(q.dtype)

"""Attention by JAX's splash kernel, for TPUs: no array of scores is ever written to memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

LANES = 128
"""The kernel wants sequences of a multiple of this."""
MAX_BLOCK = 512
"""Rows of a block at most; not tuned."""


def attend(
    q: Float[Array, "b s heads c"],
    k: Float[Array, "b s kv c"],
    v: Float[Array, "b s kv c"],
    rows: int | None = None,
    batch: Any = None,
    interpret: bool = False,
) -> Float[Array, "b s heads c"]:
    """softmax(q k / sqrt(c)) v over the first `rows` keys (None: all); query head i reads head i // (heads / kv).

    The sequence is padded to a multiple of LANES, and only padding is masked. `batch` is the sharding of the first
    axis: the compiler cannot divide a kernel by itself. `interpret` runs it without a TPU, slowly.

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
    # Padded queries see what others see, and are dropped; padded keys are another segment, which nobody sees.
    padding = (np.arange(padded) >= rows).astype(np.int32)
    segments = splash_attention_kernel.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=jnp.asarray(padding))
    ready = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - S), (0, 0)))
        for x in (q * jnp.asarray(c**-0.5, q.dtype), k, v)
    )
    mixed = jax.vmap(lambda *one: kernel(*one, segment_ids=segments))(*ready)
    return jnp.swapaxes(mixed[:, :, :S], 1, 2).astype(q.dtype)

"""Process a batch in chunks, so that arrays as wide as the vocabulary stay small."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(tree: Any, size: int) -> Any:
    """Reshape leaves [B, ...] to [B/size, size, ...]; chunk j contains images j, j + B/size, ...

    If the batch axis is sharded, the stride keeps every chunk spread over all devices, which chunks of neighbours would
    not be. Raises ValueError if `size` does not divide B.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % size:
            raise ValueError(f"a batch of {leaf.shape[0]} cannot be split into chunks of {size}.")
        return jnp.moveaxis(leaf.reshape(size, leaf.shape[0] // size, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(one, tree)


def join(tree: Any) -> Any:
    """Undo `split`: [n, size, ...] -> [n*size, ...] in the original order of the batch."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), tree)


def pad_rows(tree: Any, rows: int) -> Any:
    """Pad leaves [B, ...] to [rows, ...] by repeating the last row; leaves of that length are returned unchanged."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = rows - leaf.shape[0]
        return leaf if not missing else jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])

    return jax.tree.map(one, tree)


def chunk_size(batch: int, limit: int) -> int:
    """Return the largest divisor of `batch` that is at most `limit` (`batch` itself for limit <= 0)."""
    if limit <= 0 or limit >= batch:
        return batch
    return max(size for size in range(1, limit + 1) if batch % size == 0)


def map_chunks(fn: Callable[[Any], Any], tree: Any, size: int, unroll: int = 1) -> Any:
    """Apply `fn` to chunks of at most `size` along the batch axis in turn; `fn` must treat images independently.

    unroll: chunks in the body of the compiled loop, which a CPU may compute in parallel.
    """
    batch = jax.tree.leaves(tree)[0].shape[0]
    size = chunk_size(batch, size)
    if size == batch:
        return fn(tree)
    return join(jax.lax.scan(lambda _, part: ((), fn(part)), (), split(tree, size), unroll=unroll)[1])

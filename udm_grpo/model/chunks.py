"""Work through a batch in chunks, so that arrays as wide as the vocabulary stay small."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(tree: Any, size: int) -> Any:
    """Leaves [B, ...] -> [B/size, size, ...]; chunk j holds images j, j + B/size, ...

    The stride keeps every chunk spread over all devices when the batch axis is sharded, which B/size runs of
    neighbours would not. Raises ValueError when `size` does not divide B.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] % size:
            raise ValueError(f"a batch of {leaf.shape[0]} cannot be worked through in chunks of {size}.")
        return jnp.moveaxis(leaf.reshape(size, leaf.shape[0] // size, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(one, tree)


def join(tree: Any) -> Any:
    """Return the inverse of `split`: [n, size, ...] -> [n*size, ...] in the batch's own order."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), tree)


def pad_rows(tree: Any, rows: int) -> Any:
    """Leaves [B, ...] -> [rows, ...], the last row repeated; leaves of that length already are returned as they are."""

    def one(leaf: jax.Array) -> jax.Array:
        missing = rows - leaf.shape[0]
        return leaf if not missing else jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])

    return jax.tree.map(one, tree)


def chunk_size(batch: int, wanted: int) -> int:
    """Return the largest divisor of `batch` that is at most `wanted` (all of it for wanted <= 0)."""
    if wanted <= 0 or wanted >= batch:
        return batch
    return max(size for size in range(1, wanted + 1) if batch % size == 0)


def map_chunks(fn: Callable[[Any], Any], tree: Any, size: int) -> Any:
    """`fn` over chunks of `size` along the batch axis, one after the other; `fn` must treat images independently."""
    batch = jax.tree.leaves(tree)[0].shape[0]
    size = chunk_size(batch, size)
    if size == batch:
        return fn(tree)
    return join(jax.lax.map(fn, split(tree, size)))

"""Tests of splitting a batch into chunks, and of padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from udm_grpo.model.chunks import chunk_size, join, map_chunks, pad_rows, split


def test_join_undoes_split() -> None:
    x = jnp.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(join(split(x, 4)), x)
    assert split(x, 4).shape == (3, 4, 2)


def test_a_chunk_takes_images_from_everywhere() -> None:
    np.testing.assert_array_equal(split(jnp.arange(6), 2), [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize(("batch", "limit", "size"), [(12, 5, 4), (12, 0, 12), (12, 99, 12), (7, 3, 1)])
def test_chunk_size_divides(batch: int, limit: int, size: int) -> None:
    assert chunk_size(batch, limit) == size


@pytest.mark.parametrize("size", [1, 4, 12])
def test_map_chunks_equals_the_whole(size: int) -> None:
    x = jnp.arange(12, dtype=jnp.float32)
    np.testing.assert_array_equal(map_chunks(lambda part: part * 2, x, size), x * 2)


def test_padding_repeats_the_last_row() -> None:
    tree = {"ids": jnp.arange(6).reshape(3, 2), "score": jnp.arange(3.0)}
    padded = pad_rows(tree, 5)
    np.testing.assert_array_equal(padded["ids"], [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    np.testing.assert_array_equal(padded["score"], [0, 1, 2, 2, 2])
    assert pad_rows(tree, 3)["ids"] is tree["ids"]


def test_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 12"):
        split(jnp.arange(12), 5)

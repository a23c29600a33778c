"""How configured batches are fitted to meshes that divide them, and to meshes that do not."""

import jax
import numpy as np
import pytest

from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import batch_sizes, micro_batch
from udm_grpo.batches import BatchSizes, padded
from udm_grpo.config import RunConfig


@pytest.mark.parametrize(
    ("total", "asked", "shards", "size", "rows"),
    [
        (128, 32, 1, 32, 128),
        (128, 32, 8, 32, 128),
        (384, 32, 32, 32, 384),
        # 7 of 8 GPUs: 28 or 35 at a time.
        (128, 32, 7, 28, 140),
        (384, 32, 7, 35, 385),
        (16, 8, 7, 7, 21),
        # 6 of 8, 28 of 32.
        (128, 32, 6, 36, 144),
        (128, 32, 28, 28, 140),
        (384, 32, 28, 28, 392),
        # More devices than rows, more rows requested than there are, and a size that does not divide.
        (4, 4, 8, 8, 8),
        (16, 64, 4, 16, 16),
        (128, 35, 1, 32, 128),
        (128, 48, 8, 48, 144),
    ],
)
def test_a_micro_batch_fits_the_devices_with_little_padding(total, asked, shards, size, rows):
    assert micro_batch(total, asked, shards) == size
    assert padded(total, size) == rows


def test_every_micro_batch_is_spread_evenly_and_none_is_padding_only():
    for total in (1, 5, 16, 48, 128):
        for shards in (1, 2, 3, 6, 7, 8, 28):
            for asked in (1, 2, 7, 32, 200):
                size = micro_batch(total, asked, shards)
                assert size % shards == 0
                assert size < asked + shards
                assert padded(total, size) - total < size
                assert micro_batch(total, size, shards) == size  # a size that a search reports can be configured
                if total % asked == 0 and asked % shards == 0:
                    assert size == asked


def test_the_sizes_of_a_run():
    config = RunConfig()  # 16 x 8 images, 3 trained steps, 32 at a time
    sizes = batch_sizes(config, meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    assert sizes == BatchSizes(images=128, rollout=32, states=384, minibatches=1, update=32, evaluation=32)
    assert (sizes.drawn, sizes.trained) == (128, 384)
    grid = np.asarray(jax.devices()[:1] * 7, dtype=object).reshape(7, 1, 1)
    seven = batch_sizes(config, jax.sharding.Mesh(grid, meshes.AXES))
    assert seven == BatchSizes(images=128, rollout=28, states=384, minibatches=1, update=35, evaluation=28)
    assert (seven.drawn, seven.trained) == (140, 385)

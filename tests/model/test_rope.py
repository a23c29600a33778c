"""Tests of the three-axis rotary position embedding."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, golden_cases

from udm_grpo.model.rope import HEAD_DIM, axis_of_frequency, positions, rotary_table, rotate


@golden_cases()
def test_positions_of_an_image(case: GoldenCase) -> None:
    at = positions(case.setup["L"], *case.setup["hw"])
    np.testing.assert_array_equal(at, case.arrays["rope_pos"])


@golden_cases()
def test_positions_of_two_frames(case: GoldenCase) -> None:
    at = positions(5, 3, 2, frames=2)[5:]
    np.testing.assert_array_equal(at, case.arrays["rope_pos_2x3x2_shift5"])


@golden_cases()
def test_rotation(case: GoldenCase) -> None:
    turned = rotate(jnp.asarray(case.arrays["rotary_in"]), rotary_table(case.arrays["rotary_pos"], 1e6))
    # The release interleaves the rotated pairs; attention uses only dot products, which do not depend on the order.
    low, high = jnp.split(turned, 2, axis=-1)
    side_by_side = jnp.stack([low, high], axis=-1).reshape(turned.shape)
    assert_close(side_by_side, case.arrays["rotary_out"])


def test_axes_take_turns() -> None:
    axes = axis_of_frequency()
    assert axes.shape == (HEAD_DIM // 2,)
    assert list(axes[:6]) == [0, 1, 2, 0, 1, 2]
    assert list(axes[48:52]) == [1, 2, 1, 2]


def test_rotation_keeps_lengths_and_dtype() -> None:
    x = jnp.ones((1, 7, 2, HEAD_DIM), jnp.bfloat16)
    turned = rotate(x, rotary_table(positions(2, 2, 2), 1e6))
    assert turned.dtype == jnp.bfloat16
    norms = jnp.linalg.norm(turned.astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(norms, np.sqrt(HEAD_DIM), rtol=1e-2)


@pytest.mark.parametrize("shift", [0, 3])
def test_scores_depend_on_distance_only(shift: int) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, HEAD_DIM)).astype(np.float32)
    near = np.array([[1, 2, 3]]) + shift
    far = np.array([[2, 4, 3]]) + shift
    score = jnp.sum(rotate(jnp.asarray(q), rotary_table(near, 1e6)) * rotate(jnp.asarray(k), rotary_table(far, 1e6)))
    start = jnp.sum(
        rotate(jnp.asarray(q), rotary_table(near - shift, 1e6)) * rotate(jnp.asarray(k), rotary_table(far - shift, 1e6))
    )
    np.testing.assert_allclose(score, start, rtol=1e-4)

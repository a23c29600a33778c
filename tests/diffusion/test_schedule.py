"""Tests of the times of a rollout and of pre-training."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, golden_cases

from udm_grpo.diffusion.schedule import pretraining_time, timesteps


@golden_cases()
def test_times(case: GoldenCase) -> None:
    for steps in (4, 10, 25):
        np.testing.assert_allclose(
            timesteps(steps, case.setup["shift"]), case.arrays[f"schedule_t_{steps}"], atol=1e-12
        )
    times = pretraining_time(jnp.asarray(case.arrays["pretrain_u"]), case.setup["shift"])
    assert_close(times, case.arrays["pretrain_t_of_u"])


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_start_at_zero_and_rise_below_one(shift: float) -> None:
    t = timesteps(10, shift)
    assert t[0] == 0
    assert (np.diff(t) > 0).all()
    assert t[-1] < 1


def test_a_rollout_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        timesteps(0, 1.0)

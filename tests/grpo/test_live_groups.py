"""Tests of updates that leave dead groups out."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from udm_grpo.batches import BatchSizes, Samples
from udm_grpo.grpo.live_groups import LIVE, live_first, marked
from udm_grpo.grpo.loss import UDMGRPO
from udm_grpo.grpo.samples import of_step
from udm_grpo.grpo.trajectory import TrajectoryPlan
from udm_grpo.grpo.update import accumulated_gradients
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import init

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 40, 10, 40, 2)
NETWORK = Network(CONFIG, (2, 3), rows=2)
LOSS = UDMGRPO(TrajectoryPlan(10, 1.0), clip_range=0.2, kl_weight=0.05)
SIZES = BatchSizes(images=8, rollout=8, states=16, minibatches=1, update=4, evaluation=8)
"""Two states each of two images of four prompts."""
SCORE = jnp.float32([[1, 1], [0, 1], [0, 0], [0.5, 0.25]])
LIVE_IMAGES = np.array([2, 3, 6, 7])
LIVE_STATES = np.concatenate([LIVE_IMAGES, 8 + LIVE_IMAGES])


def rolled() -> Samples:
    rng = np.random.default_rng(3)
    draw = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    ref_logp = jnp.asarray(rng.normal(-2, 0.1, 16), jnp.float32)
    return Samples(draw(10, 16, 4), draw(40, 16, 6), draw(40, 16, 6), jnp.zeros(16), {"ref_logp": ref_logp})


def taken(samples: Samples, rows: np.ndarray) -> Samples:
    return jax.tree.map(lambda leaf: leaf[rows], samples)


def gradients(samples: Samples, skip_empty: bool, objective: Any = LOSS) -> Any:
    params = init(CONFIG, jax.random.key(0))
    return jax.jit(lambda p, x: accumulated_gradients(NETWORK, objective, p, x, 4, skip_empty=skip_empty))(
        params, samples
    )


@pytest.fixture(name="counted")
def fixture_counted() -> tuple[Any, Callable[[], int]]:
    """Return an objective and a function that returns how many micro-batches it has computed."""
    calls: list[int] = []

    class Counting(UDMGRPO):
        def loss(self, network: Network, params: Any, samples: Samples) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return super().loss(network, params, samples)

    def count() -> int:
        jax.effects_barrier()
        return len(calls)

    return Counting(LOSS.trajectory, LOSS.clip_range, LOSS.kl_weight), count


def test_the_update_is_that_of_the_live_states_alone(counted: tuple[Any, Callable[[], int]]) -> None:
    objective, computed = counted
    whole = of_step(LOSS, NETWORK, SIZES, rolled(), SCORE, None)
    expected, expected_metrics = gradients(taken(whole, LIVE_STATES), False)
    result, metrics = gradients(of_step(LOSS, NETWORK, SIZES, rolled(), SCORE, None, True), True, objective)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), result, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), metrics, expected_metrics)
    assert computed() == 2  # of four


def test_every_state_of_a_live_group_stays_once() -> None:
    numbered = dataclasses.replace(rolled(), frozen={"ref_logp": jnp.arange(16.0)})
    part = live_first(marked(numbered, LOSS.weights(SCORE), SIZES), SIZES.update)
    assert sorted(np.asarray(part.frozen["ref_logp"])) == list(range(16))
    assert sorted(np.asarray(part.frozen["ref_logp"])[np.asarray(part.weight) > 0]) == sorted(LIVE_STATES)
    assert LIVE not in part.frozen


@pytest.mark.parametrize("images", [[0, 2, 4, 6], [7, 5, 3, 1]])
def test_minibatches_leave_theirs_out(images: list[int]) -> None:
    sizes = dataclasses.replace(SIZES, minibatches=2)
    part = of_step(LOSS, NETWORK, sizes, rolled(), SCORE, jnp.array(images), True)
    kept = np.asarray(part.action)[np.asarray(part.weight) > 0]
    rows = [8 * step + image for step in (0, 1) for image in images if image in LIVE_IMAGES]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, np.asarray(rolled().action)[rows]))


def test_padding_stays_without_weight() -> None:
    """Twelve states in chunks of eight: the four padding states count for nothing."""
    sizes = dataclasses.replace(SIZES, images=6, rollout=6, states=12, update=8)
    samples = dataclasses.replace(rolled(), weight=jnp.float32([1] * 12 + [0] * 4))
    part = of_step(LOSS, NETWORK, sizes, samples, SCORE[:3], None, True)
    assert np.asarray(part.weight).sum() == 4
    kept = np.asarray(part.action)[np.asarray(part.weight) > 0]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, np.asarray(samples.action)[[2, 3, 8, 9]]))


def test_with_dead_groups_only_the_metrics_are_those_of_all() -> None:
    equal = jnp.ones_like(SCORE)
    _, expected = gradients(of_step(LOSS, NETWORK, SIZES, rolled(), equal, None), False)
    _, metrics = gradients(of_step(LOSS, NETWORK, SIZES, rolled(), equal, None, True), True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), metrics, expected)

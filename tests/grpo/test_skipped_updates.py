"""Tests of skipped updates: gradients that are not finite, and rollouts in which no image is better than another."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from udm_grpo.batches import Samples, TrainState
from udm_grpo.grpo.advantages import advantages
from udm_grpo.grpo.loss import UDMGRPO
from udm_grpo.grpo.optimizer import adamw, largest, learning_rate
from udm_grpo.grpo.optimizer import step as optimizer_step
from udm_grpo.grpo.trajectory import TrajectoryPlan
from udm_grpo.grpo.update import EmaPlan, has_signal, update
from udm_grpo.lifecycle.iteration_checks import WARN_AFTER, DivergedError, SignalWatch, check_finite
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import init

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 40, 10, 40, 2)
NETWORK = Network(CONFIG, (2, 3), rows=2)
LOSS = UDMGRPO(TrajectoryPlan(10, 1.0), clip_range=0.2, kl_weight=0.05)
WARM = learning_rate(1e-2, "constant", 10, warmup=4)
ADAM = adamw(WARM, 0.9, 0.95, 0.1, 1.0)


def samples(advantage: float = 1.0) -> Samples:
    """Return eight states whose reference is another model, so that the KL term has a gradient for any advantages."""
    rng = np.random.default_rng(3)
    draw = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)  # noqa: E731
    signs = jnp.asarray(np.sign(rng.normal(size=8)), jnp.float32)
    return Samples(draw(10, 8, 4), draw(40, 8, 6), draw(40, 8, 6), advantage * signs, {"ref_logp": jnp.full(8, -2.0)})


@functools.cache
def first() -> TrainState:
    params = init(CONFIG, jax.random.key(0))
    return TrainState(params, ADAM.init(params), jax.tree.map(jnp.copy, params), jnp.int32(0))


@functools.cache
def step() -> Any:
    return jax.jit(lambda s, x: update(NETWORK, LOSS, ADAM, EmaPlan(0.9), 8, s, s.params, x))


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def counts(state: TrainState) -> list[int]:
    """Return every counter of a state: those of Adam and of the schedule, and the number of updates."""
    leaves = jax.tree.leaves(state.opt_state)
    return [int(leaf) for leaf in leaves if leaf.dtype == jnp.int32] + [int(state.step)]


def test_without_any_advantage_there_is_no_step_and_nothing_counts() -> None:
    """Only the KL term has a gradient here, from which Adam would make a step of full length."""
    one, metrics = step()(first(), samples())
    assert float(metrics["skipped"]) == 0
    assert counts(one) == [1, 1, 1]
    dead, metrics = step()(one, samples(0.0))
    assert float(metrics["skipped"]) == 1
    assert float(metrics["grad_norm"]) > 1e-3
    assert_same(dead, one)
    # The next update is the same as without the dead rollout, including bias correction, warm-up and average.
    assert_same(step()(dead, samples(2.0))[0], step()(one, samples(2.0))[0])


def test_an_advantage_of_padding_alone_is_none() -> None:
    padded = dataclasses.replace(samples(0.0), weight=jnp.float32([1] * 7 + [0]))
    padded = dataclasses.replace(padded, advantage=padded.advantage.at[7].set(3.0))
    assert not has_signal(padded)
    assert has_signal(dataclasses.replace(padded, advantage=padded.advantage.at[0].set(-0.5)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_whose_gradient_is_not_finite_leaves_everything_as_it_was(bad: float) -> None:
    """The loss is finite in all states but one; the gradient of a weight is a sum over all states."""
    one, _ = step()(first(), samples())
    broken = samples()
    broken = dataclasses.replace(broken, advantage=broken.advantage.at[2].set(bad))
    after, metrics = step()(one, broken)
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["skipped"]) == 1
    assert np.isfinite(float(metrics["weight_max"]))
    assert_same(after, one)


def test_a_norm_that_overflows_skips_the_step_of_every_optimizer() -> None:
    """Pre-training and the image tokenizer use the same function for their steps."""
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    huge = jax.tree.map(lambda leaf: leaf * jnp.float32(1e30), params)
    adam_step = jax.jit(lambda g: optimizer_step(ADAM, g, ADAM.init(params), params))
    after, state, norm = adam_step(huge)
    assert float(norm) == np.inf
    assert_same((after, state), (params, ADAM.init(params)))
    after, state, norm = adam_step(params)
    assert float(norm) == pytest.approx(7**0.5)
    assert (np.asarray(after["a"]) < 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_largest_weight_tells_of_every_number_that_is_not_finite(bad: float) -> None:
    for size in (3, 1000):  # vectorised code and its remainder loop
        for at in (0, size - 1):
            tree = {"a": jnp.ones(2), "b": jnp.ones(size, jnp.bfloat16).at[at].set(bad)}
            assert not np.isfinite(float(jax.jit(largest)(tree))), (size, at)
            assert not np.isfinite(float(largest(tree))), (size, at)
    assert float(largest({"a": jnp.float32([-4, 3])})) == 4


def test_dead_groups_have_advantages_of_exactly_zero() -> None:
    """The rounded mean of three equal scores may differ from their value."""
    equal = jnp.broadcast_to(jnp.float32([[0.1], [0.7], [20.3], [-4.0]]), (4, 3))
    alive = jnp.float32([[0.1, 0.2, 0.4]])
    for global_std in (False, True):
        np.testing.assert_array_equal(advantages(equal, 5.0, global_std), np.zeros((4, 3)))
        both = advantages(jnp.concatenate([equal, alive]), 5.0, global_std)
        np.testing.assert_array_equal(both[:4], np.zeros((4, 3)))
        assert (np.asarray(both[4]) != 0).all()
    assert np.isnan(np.asarray(advantages(jnp.float32([[jnp.nan, jnp.nan]]), 5.0))).any()


def test_a_number_that_is_not_finite_is_named_with_its_iteration() -> None:
    check_finite("iteration", 7, {"loss": 0.5, "kl": -1.0}, "")
    with pytest.raises(DivergedError, match=r"iteration 7: grad_norm is nan, loss is -inf\..*Lower it\."):
        check_finite("iteration", 7, {"kl": 0.1, "grad_norm": float("nan"), "loss": -np.inf}, "Lower it.")


def test_a_warning_comes_after_some_dead_iterations_in_a_row_and_then_ever_more_rarely() -> None:
    watch = SignalWatch()
    warned = {iteration: watch.watch(iteration, 1.0) for iteration in range(1, 40)}
    assert [iteration for iteration, text in warned.items() if text] == list(WARN_AFTER[:2])
    assert "iterations 1 to 3 made no update" in warned[3]
    assert watch.skipped == 39
    assert not watch.watch(40, 0.5)  # some of its steps were made
    warned = {iteration: watch.watch(iteration, 1.0) for iteration in range(41, 44)}
    assert [text.partition(" made")[0] for text in warned.values()] == ["", "", "warning: iterations 41 to 43"]
    assert watch.skipped == 42


def test_a_schedule_stands_still_while_steps_are_skipped() -> None:
    """The second step that is not skipped has the second rate of the warm-up, however many were skipped before it."""
    sgd = optax.chain(optax.scale_by_schedule(WARM), optax.scale(-1.0))
    params, state = {"a": jnp.zeros(1)}, sgd.init({"a": jnp.zeros(1)})
    gradient = {"a": jnp.ones(1)}
    moved = []
    for skipped in (False, True, True, False):
        params, state, _ = optimizer_step(sgd, gradient, state, params, jnp.bool_(skipped))
        moved.append(-float(params["a"][0]))
    assert moved == pytest.approx([0.0025, 0.0025, 0.0025, 0.0075], rel=1e-5)

"""Tests of the rollout: equal to a Python loop, independent of micro-batches, and decided by keys only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.diffusion.rollout import RolloutPlan, denoise, image_keys, rollout, start_tokens, step_times
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import init

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 40, 10, 40, 2)
B, L = 4, 3
NETWORK, PLAN = Network(CONFIG, (2, 3), rows=2), RolloutPlan(steps=6)


def _path(alpha: float | None = 0.9) -> ProbabilityPath:
    return make_path(jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32), alpha, 3.0)


def _arguments() -> tuple:
    params = jax.tree.map(lambda leaf: leaf * 10, init(CONFIG, jax.random.key(0)))
    prompts = jnp.asarray(np.random.default_rng(1).integers(3, 10, (B, L)), jnp.int32)
    return params, prompts, jnp.zeros(L, jnp.int32), jnp.arange(B, dtype=jnp.int32), jax.random.key(7)


def _run(plan: RolloutPlan, path: ProbabilityPath, **changes) -> jax.Array:
    names = ("params", "prompts", "empty", "index", "key")
    arguments = dict(zip(names, _arguments(), strict=True)) | changes
    run = jax.jit(lambda *a: rollout(NETWORK, path, plan, *a))
    return run(*(arguments[name] for name in names))


@pytest.mark.parametrize("alpha", [0.9, None])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_compiled_rollout_equals_a_python_loop(alpha: float | None, scale: float) -> None:
    path = _path(alpha)
    plan = dataclasses.replace(PLAN, guidance_scale=scale, guidance_trunc=0.6, keep_trajectory=True)
    params, prompts, empty, index, key = _arguments()
    keys = image_keys(key, index)
    x = start_tokens(path, jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys), 6)
    visited, predicted = [], []
    step = jax.jit(
        lambda p, x, now, guided: denoise(NETWORK, path, plan, p, prompts, empty, keys, x, now, guided),
        static_argnums=3,
    )
    for k in range(plan.steps):
        now = {name: jnp.asarray(value[k]) for name, value in step_times(path, plan).items()}
        visited.append(x)
        x, x_1 = step(params, x, now, bool(plan.guided()[k]))
        predicted.append(x_1)
    compiled = _run(plan, path)
    np.testing.assert_array_equal(compiled.clean, x)
    np.testing.assert_array_equal(compiled.visited, jnp.stack(visited))
    np.testing.assert_array_equal(compiled.predicted, jnp.stack(predicted))


def test_the_last_output_is_its_prediction() -> None:
    result = _run(dataclasses.replace(PLAN, keep_trajectory=True), _path())
    np.testing.assert_array_equal(result.clean, result.predicted[-1])


def test_skipping_the_dead_first_step_is_exact() -> None:
    path = _path()
    kept = _run(dataclasses.replace(PLAN, keep_trajectory=True), path)
    short = _run(PLAN, path)
    assert (PLAN.first_step(path), dataclasses.replace(PLAN, keep_trajectory=True).first_step(path)) == (1, 0)
    assert PLAN.first_step(_path(None)) == 0
    np.testing.assert_array_equal(short.clean, kept.clean)
    np.testing.assert_array_equal(kept.visited[0], kept.visited[1])
    assert short.visited is None


def test_micro_batches_and_row_chunks_change_nothing() -> None:
    path = _path()
    params, prompts, empty, index, key = _arguments()
    whole = _run(PLAN, path).clean
    run = jax.jit(lambda *a: rollout(dataclasses.replace(NETWORK, rows=1), path, PLAN, *a))
    parts = [run(params, prompts[i : i + 2], empty, index[i : i + 2], key).clean for i in (0, 2)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)


def test_keys_decide() -> None:
    path = _path()
    whole = _run(PLAN, path).clean
    np.testing.assert_array_equal(whole, _run(PLAN, path).clean)
    assert (whole != _run(PLAN, path, key=jax.random.key(8)).clean).any()
    assert (whole != _run(PLAN, path, index=jnp.arange(B, 2 * B, dtype=jnp.int32)).clean).any()


def test_guidance_only_acts_before_its_end() -> None:
    plan = dataclasses.replace(PLAN, guidance_scale=3.0, guidance_trunc=0.5)
    assert list(plan.guided()) == [True, True, True, False, False, False]
    assert not PLAN.guided().any()
    path = _path()
    off = _run(dataclasses.replace(plan, guidance_trunc=0.0), path).clean
    np.testing.assert_array_equal(off, _run(PLAN, path).clean)
    assert (_run(plan, path).clean != off).any()


@pytest.mark.parametrize(("alpha", "passes"), [(0.9, 5), (None, 6)])
def test_forward_passes_of_a_rollout(alpha: float | None, passes: int) -> None:
    """A rollout of T steps has T - 1 forward passes on the metric path and T on the mixture path."""
    text = str(jax.make_jaxpr(lambda *a: rollout(NETWORK, _path(alpha), PLAN, *a).clean)(*_arguments()))
    assert f"length={passes}" in text
    assert f"length={passes + 1}" not in text


def test_perfect_model_denoises() -> None:
    """If the logits are the answer, every token ends at the answer."""
    from udm_grpo.diffusion.rollout import sample_step

    path, answer = _path(), jnp.arange(40, dtype=jnp.int32)
    logits = jnp.where(jnp.eye(40, dtype=bool), 50.0, 0.0)
    x = jnp.zeros(40, jnp.int32)
    for k in range(PLAN.steps):
        now = {name: jnp.asarray(value[k]) for name, value in step_times(path, PLAN).items()}
        x, _ = sample_step(path, logits, x, now, jax.random.uniform(jax.random.key(k), (40, 5)))
    np.testing.assert_array_equal(x, answer)

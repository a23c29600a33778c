"""Tests of exact draws from categorical distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from udm_grpo.diffusion.categorical import TILE, categorical, uniforms

DRAWS = 40_000


def _histogram(log_weights: np.ndarray, seed: int) -> np.ndarray:
    u = uniforms(jax.random.key(seed), DRAWS, 2)
    rows = jnp.broadcast_to(jnp.asarray(log_weights, jnp.float32), (DRAWS, len(log_weights)))
    draws = jax.jit(lambda a, b: jax.lax.map(lambda x: categorical(x[0][None], x[1][None])[0], (a, b), batch_size=2000))
    return np.bincount(np.asarray(draws(rows, u)), minlength=len(log_weights))


@pytest.mark.parametrize("codes", [2, 97, TILE, TILE + 1, 1500])
def test_law(codes: int) -> None:
    log_weights = np.random.default_rng(codes).normal(size=codes) * 1.5
    expected = np.exp(log_weights) / np.exp(log_weights).sum() * DRAWS
    counts = _histogram(log_weights, codes)
    large = expected >= 5
    bins = np.append(expected[large], expected[~large].sum()), np.append(counts[large], counts[~large].sum())
    keep = bins[0] > 0
    assert stats.chisquare(bins[1][keep], bins[0][keep] * bins[1].sum() / bins[0][keep].sum()).pvalue > 1e-3


def test_entries_without_weight_are_never_drawn() -> None:
    log_weights = np.full(3 * TILE, -np.inf)
    log_weights[[5, TILE + 7, 3 * TILE - 4]] = [0.0, 1.0, -1.0]  # all other entries are empty
    counts = _histogram(log_weights, 0)
    assert set(np.flatnonzero(counts)) == {5, TILE + 7, 3 * TILE - 4}


@pytest.mark.parametrize("codes", [4, 2 * TILE])
def test_largest_uniform_stays_inside(codes: int) -> None:
    log_weights = jnp.full((1, codes), -jnp.inf).at[0, 1].set(0.0)
    edge = jnp.full((1, 2), np.nextafter(np.float32(1), np.float32(0)))
    assert int(categorical(log_weights, edge)[0]) == 1
    assert int(categorical(log_weights, jnp.zeros((1, 2)))[0]) == 1


def test_shift_of_log_weights_changes_nothing() -> None:
    log_weights = jnp.asarray(np.random.default_rng(0).normal(size=(50, 700)), jnp.float32)
    u = uniforms(jax.random.key(1), 50, 2)
    np.testing.assert_array_equal(categorical(log_weights, u), categorical(log_weights + 64.0, u))

"""Tests of the probability path and its jump process: golden numbers, exact laws and distributions of draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, golden_cases
from golden_model import load_model
from scipy import stats

from udm_grpo.diffusion import path as paths
from udm_grpo.diffusion.categorical import uniforms
from udm_grpo.diffusion.path import ProbabilityPath, make_path


def _times(path: ProbabilityPath, t: float, rows: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    one = jnp.ones(rows)
    return np.float32(paths.level(path, np.float64(t))) * one, np.float32(paths.rate(path, np.float64(t))) * one


def _chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    mean = law * counts.sum()
    large = mean >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(mean[large], mean[~large].sum())
    keep = expected > 1e-9
    assert observed[~keep].sum() == 0
    return float(stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue)


@golden_cases()
def test_probabilities_velocities_and_rates(case: GoldenCase) -> None:
    model = load_model(case)
    x_1, x_t = model.ids("x1"), model.ids("xt")
    for i, t in enumerate(case.arrays["path_ts"]):
        at, slope = _times(model.path, t, model.tokens)
        p = jax.nn.softmax(paths.noise_log_weights(model.path, x_1[0], at), axis=-1)
        assert_close(p[None], case.arrays["path_prob"][i])
        if f"velocity_{i}" in case.arrays:
            u = paths.velocity(model.path, x_t[0], x_1[0], at, slope)
            assert_close(u[None], case.arrays[f"velocity_{i}"])
        at, slope = _times(model.path, t, x_1.size)
        rate = paths.exit_rate(model.path, x_t.reshape(-1), x_1.reshape(-1), at, slope)[0].reshape(x_1.shape)
        assert_close(rate, case.arrays[f"exit_rate_{i}"])
        assert_close(-jnp.expm1(-jnp.float32(0.07) * rate), case.arrays[f"jump_prob_{i}_dt0.07"])


@golden_cases()
def test_mixture_velocity(case: GoldenCase) -> None:
    model = load_model(case)
    mixture = make_path(model.path.codebook, None, 0.0)
    at, slope = _times(mixture, 0.25, 4)
    u = paths.velocity(mixture, jnp.full(4, -1, jnp.int32), model.ids("x1")[0, :4], at, slope)
    assert_close(u, case.arrays["mixture_velocity"])


@golden_cases()
def test_noise_histogram(case: GoldenCase) -> None:
    model = load_model(case)
    draws = 20_000
    for token, (x_1, hist) in enumerate(zip(case.arrays["noise_x1"], case.arrays["noise_hist"], strict=True)):
        at, _ = _times(model.path, case.arrays["noise_t"], draws)
        start = jnp.full(draws, x_1, jnp.int32)
        noisy = paths.add_noise(model.path, start, at, uniforms(jax.random.key(token), draws, 2))
        counts = np.bincount(np.asarray(noisy), minlength=model.path.codes)
        law = jax.nn.softmax(paths.noise_log_weights(model.path, start[:1], at[:1]), axis=-1)[0]
        assert _chi_square(counts, np.asarray(law, np.float64)) > 1e-3
        assert _chi_square(hist, np.asarray(law, np.float64)) > 1e-3


def _small_path(alpha: float | None = 0.9) -> ProbabilityPath:
    return make_path(jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32), alpha, 3.0)


@pytest.mark.parametrize("alpha", [0.9, None])
def test_endpoints(alpha: float | None) -> None:
    path = _small_path(alpha)
    x_1 = jnp.arange(5, dtype=jnp.int32)
    start = jax.nn.softmax(paths.noise_log_weights(path, x_1, _times(path, 0.0, 5)[0]), axis=-1)
    np.testing.assert_allclose(start, 1 / 40, rtol=1e-5)
    end = jax.nn.softmax(paths.noise_log_weights(path, x_1, _times(path, 0.9999, 5)[0]), axis=-1)
    assert (np.asarray(end)[np.arange(5), np.arange(5)] > 0.99).all()


@pytest.mark.parametrize("alpha", [0.9, None])
def test_velocity_moves_the_law_along_the_path(alpha: float | None) -> None:
    """The continuity equation holds for every code: d/dt p_t = inflow - outflow of the jump process."""
    path, x_1, t, h = _small_path(alpha), jnp.array([7], jnp.int32), 0.4, 1e-3

    def p(time: float) -> np.ndarray:
        weights = paths.noise_log_weights(path, x_1, _times(path, time, 1)[0])
        return np.asarray(jax.nn.softmax(weights, axis=-1)[0], np.float64)

    z = jnp.arange(path.codes, dtype=jnp.int32)
    at, slope = _times(path, t, path.codes)
    u = np.asarray(paths.velocity(path, z, jnp.full(path.codes, 7, jnp.int32), at, slope), np.float64)
    flow = p(t) @ u - p(t) * u.sum(axis=1)
    slope_of_p = (p(t + h) - p(t - h)) / (2 * h)
    np.testing.assert_allclose(flow, slope_of_p, atol=3e-4 * np.abs(slope_of_p).max() + 2e-5)


@pytest.mark.parametrize("alpha", [0.9, None])
def test_a_clean_token_never_moves(alpha: float | None) -> None:
    path = _small_path(alpha)
    x_1 = jnp.arange(40, dtype=jnp.int32)
    at, slope = _times(path, 0.7, 40)
    assert float(paths.exit_rate(path, x_1, x_1, at, slope)[0].max()) == 0
    moved = paths.step(path, x_1, x_1, at[0], slope[0], jnp.float32(100), uniforms(jax.random.key(0), 40, 3))
    np.testing.assert_array_equal(moved, x_1)


def test_nothing_moves_at_time_zero_on_the_metric_path() -> None:
    path = _small_path()
    assert path.still_at_zero
    assert not _small_path(None).still_at_zero
    assert paths.rate(path, np.float64(0)) == 0
    assert float(paths.rate(path, jnp.float32(0))) == 0


@golden_cases()
def test_sampler_step_histogram(case: GoldenCase) -> None:
    """Draws of one sampler step and the release's histogram both follow the exact law."""
    from udm_grpo.diffusion.rollout import RolloutPlan, sample_step, step_times

    model, draws = load_model(case), 20_000
    times = step_times(model.path, RolloutPlan(steps=10, shift=model.shift))
    k = int(case.arrays["step_timestep_of_10"])
    now = {name: jnp.asarray(value[k]) for name, value in times.items()}
    for token, z in enumerate(case.arrays["step_xt"]):
        logits = jnp.asarray(case.arrays["step_logits"][token])
        law = _step_law(model.path, np.asarray(logits, np.float64), int(z), now)
        u = uniforms(jax.random.key(10 + token), draws, 5)
        rows = jnp.broadcast_to(logits, (draws, logits.shape[0]))
        after, _ = sample_step(model.path, rows, jnp.full(draws, z, jnp.int32), now, u)
        assert _chi_square(np.bincount(np.asarray(after), minlength=model.path.codes), law) > 1e-3
        assert _chi_square(case.arrays["step_next_hist"][token], law) > 1e-3


def _step_law(path: ProbabilityPath, logits: np.ndarray, z: int, now: dict) -> np.ndarray:
    """Return the sum over x_1 of p(x_1) (stay or jump), in float64."""
    p_1 = np.exp(logits - logits.max())
    p_1 /= p_1.sum()
    x_1 = jnp.arange(path.codes, dtype=jnp.int32)
    every = jnp.ones(path.codes)
    u = paths.velocity(path, jnp.full(path.codes, z, jnp.int32), x_1, now["level"] * every, now["rate"] * every)
    u = np.asarray(u, np.float64)
    rate = u.sum(axis=1)
    jump = -np.expm1(-float(now["dt"]) * rate)
    where = np.divide(u, rate[:, None], out=np.zeros_like(u), where=rate[:, None] > 0)
    law = (p_1 * jump) @ where
    law[z] += (p_1 * (1 - jump)).sum()
    return law

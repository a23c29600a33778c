"""Tests of the advantages, the loss, the update and the training states of UDM-GRPO."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_data import GoldenCase, assert_close, golden_cases
from golden_model import GoldenModel, load_model
from small_model import CONFIG, LOSS, NETWORK, random_samples

from udm_grpo.batches import Rollout, Samples, TrainState
from udm_grpo.diffusion.path import make_path
from udm_grpo.grpo.advantages import advantages
from udm_grpo.grpo.loss import UDMGRPO, k3, policy_loss, token_mean_logps
from udm_grpo.grpo.minibatches import of_images, split_images
from udm_grpo.grpo.optimizer import adamw, learning_rate
from udm_grpo.grpo.optimizer import step as optimizer_step
from udm_grpo.grpo.trajectory import TrajectoryPlan, trajectory, window
from udm_grpo.grpo.update import EmaPlan, accumulated_gradients, cast, update
from udm_grpo.model.head import head_logps
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import init

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# The KL of similar models is a small difference of large numbers: float32 errors of log-probabilities near 5 are 5e-7.
KL_TOLERANCE = 1e-4


def _samples(model: GoldenModel) -> Samples:
    prompts = model.ids("grpo_input_ids")[:, : model.case.setup["L"]]
    noisy, clean = model.ids("grpo_noisy"), model.ids("grpo_clean")
    ref_logp, _ = token_mean_logps(Network(model.config, model.grid, rows=1), model.reference, prompts, noisy, clean)
    return Samples(prompts, noisy, clean, jnp.asarray(model.case.arrays["grpo_advantages"]), {"ref_logp": ref_logp})


@golden_cases()
def test_loss_and_gradients(case: GoldenCase) -> None:
    model = load_model(case)
    samples = _samples(model)
    assert_close(samples.frozen["ref_logp"], case.arrays["grpo_ref_logps_mean"])
    network, objective = Network(model.config, model.grid, rows=1), UDMGRPO(TrajectoryPlan(10, 1.0))
    logp, _ = token_mean_logps(network, model.params, samples.prompt_ids, samples.noisy, samples.action)
    assert_close(logp, case.arrays["grpo_logps_mean"])
    both = jax.value_and_grad(lambda p: objective.loss(network, p, samples), has_aux=True)
    (loss, metrics), gradient = jax.jit(both)(model.params)
    assert_close(loss, case.arrays["grpo_loss"])
    assert_close(metrics["policy_loss"], case.arrays["grpo_policy_loss"])
    assert_close(metrics["kl"], case.arrays["grpo_kl_loss"], KL_TOLERANCE)
    assert_close(metrics["entropy"], case.arrays["grpo_entropy_image_only"])
    assert_close(metrics["clip_fraction"], case.arrays["grpo_clip_frac"])
    assert_close(optax.tree.norm(gradient), case.arrays["grad_norm"], 1e-4)
    for name, expected in case.arrays.items():
        if name.startswith("grad/model.layers") or name in ("grad/model.norm.weight", "grad/lm_head.weight"):
            assert_close(_torch_layout(gradient, name), expected, 1e-4)
    rows = gradient["embed"]["embedding"][model.config.lm_vocab_size + samples.noisy[0]]
    assert_close(rows, case.arrays["grad/embed_rows_of_noisy_row0"], 1e-4)


def _torch_layout(gradient: dict, name: str) -> jnp.ndarray:
    words = name.split("/")[1].split(".")
    if words[0] == "lm_head":
        return gradient["lm_head"]["kernel"].T
    if words[1] == "norm":
        return gradient["norm"]["scale"]
    layer, rest = int(words[2]), words[3:-1]
    names = {"self_attn": "attn", "input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
    leaf = gradient["layers"]
    for word in rest:
        leaf = leaf[names.get(word, word.removesuffix("_proj"))]
    return leaf["kernel"][layer].T if "kernel" in leaf else leaf["scale"][layer]


@golden_cases()
@pytest.mark.parametrize("global_std", [False, True])
def test_golden_advantages(case: GoldenCase, global_std: bool) -> None:
    scores = jnp.asarray(case.arrays["adv_scores_images_by_prompts"]).T
    result = advantages(scores, clip=1e9, global_std=global_std).T
    assert_close(result, case.arrays[f"adv_global_std_{global_std}"])


def test_advantages_by_hand() -> None:
    score = jnp.array([[0.0, 2.0], [5.0, 5.0]])
    np.testing.assert_allclose(advantages(score, 5.0), [[-1 / 1.0001, 1 / 1.0001], [0, 0]], rtol=1e-6)
    std = np.std([0, 2, 5, 5])
    np.testing.assert_allclose(
        advantages(score, 5.0, global_std=True), [[-1 / (std + 1e-4), 1 / (std + 1e-4)], [0, 0]], rtol=1e-6
    )
    lonely = jnp.zeros((1, 64)).at[0, 0].set(1.0)
    assert float(advantages(lonely, 5.0)[0, 0]) == 5.0


def test_policy_loss_by_hand() -> None:
    logp = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0])
    loss, outside = policy_loss(logp, jnp.zeros(4), advantage, 0.2)
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)
    np.testing.assert_allclose(loss, -(1.2 - 1.5 + 0.5 - 0.8) / 4, rtol=1e-6)
    assert float(outside) == 1.0


def test_k3_by_hand() -> None:
    np.testing.assert_allclose(k3(jnp.zeros(2), jnp.log(jnp.array([2.0, 0.5]))), (1 - np.log(2) + np.log(2) - 0.5) / 2)
    assert float(k3(jnp.array([-3.0]), jnp.array([-3.0]))) == 0.0


def test_head_gradient_equals_plain_autodiff() -> None:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(6, 5, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(8, 33)), jnp.float32)
    action = jnp.asarray(rng.integers(0, 33, (6, 5)), jnp.int32)
    weight = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)

    def plain(h: jax.Array, w: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(h @ w, axis=-1)
        return jnp.sum(weight * jnp.take_along_axis(log_p, action[:, :, None], axis=-1)[:, :, 0])

    expected = jax.grad(plain, (0, 1))(hidden, kernel)
    for rows in (1, 4, 6):
        gradient = jax.grad(lambda h, w: jnp.sum(weight * head_logps(h, w, action, rows)[0]), (0, 1))(hidden, kernel)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)


def test_head_keeps_no_logits_for_the_backward_pass() -> None:
    shapes = (jax.ShapeDtypeStruct((8, 5, 16), jnp.float32), jax.ShapeDtypeStruct((16, 999), jnp.float32))
    action = jnp.zeros((8, 5), jnp.int32)
    program = jax.jit(jax.grad(lambda h, w: jnp.sum(head_logps(h, w, action, 2)[0]), (0, 1))).lower(*shapes).as_text()
    assert "2x5x999x" in program
    assert "8x5x999x" not in program


@pytest.mark.parametrize("old", [False, True])
def test_one_by_eight_equals_eight_by_one(old: bool) -> None:
    params, samples = init(CONFIG, jax.random.key(0)), random_samples(old=old)
    gradients = jax.jit(accumulated_gradients, static_argnums=(0, 1, 4))
    whole, metrics = gradients(NETWORK, LOSS, params, samples, 8)
    for micro_batch in (1, 4):
        parts, part_metrics = gradients(NETWORK, LOSS, params, samples, micro_batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), parts, whole)
        np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("old", [False, True])
def test_states_of_weight_zero_count_for_nothing(old: bool) -> None:
    """Loss, gradient and every metric ignore them, whatever their values are."""
    params, samples = init(CONFIG, jax.random.key(0)), random_samples(old=old)
    gradients = jax.jit(accumulated_gradients, static_argnums=(0, 1, 4))

    def filled_up(other: Samples, number: float) -> Samples:
        full = jax.tree.map(lambda own, more: jnp.concatenate([own, more[:4]]), samples, other)
        advantage, ref_logp = (x.at[8:].set(number) for x in (full.advantage, full.frozen["ref_logp"]))
        weight = jnp.float32([1] * 8 + [0] * 4)
        return dataclasses.replace(
            full, weight=weight, advantage=advantage, frozen=full.frozen | {"ref_logp": ref_logp}
        )

    expected, expected_metrics = gradients(NETWORK, LOSS, params, samples, 4)
    result, metrics = gradients(NETWORK, LOSS, params, filled_up(samples, 3.0), 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), result, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), metrics, expected_metrics)
    rolled = jax.tree.map(lambda leaf: jnp.roll(leaf, 3, axis=0), samples)
    other, other_metrics = gradients(NETWORK, LOSS, params, filled_up(rolled, jnp.nan), 6)
    jax.tree.map(np.testing.assert_array_equal, (other, other_metrics), (result, metrics))


def test_old_log_probs_move_the_ratio() -> None:
    params, samples = init(CONFIG, jax.random.key(0)), random_samples()
    objective = dataclasses.replace(LOSS, kl_weight=0.0)
    logp, _ = token_mean_logps(NETWORK, params, samples.prompt_ids, samples.noisy, samples.action)
    same = dataclasses.replace(samples, frozen=samples.frozen | {"old_logp": logp})
    fresh, _ = objective.loss(NETWORK, params, samples)
    np.testing.assert_allclose(objective.loss(NETWORK, params, same)[0], fresh, rtol=1e-5)
    stale = dataclasses.replace(samples, frozen=samples.frozen | {"old_logp": logp - 1.0})
    loss, metrics = objective.loss(NETWORK, params, stale)
    assert float(metrics["clip_fraction"]) == 1.0
    A, ratio = np.asarray(samples.advantage), np.e
    np.testing.assert_allclose(loss, -np.mean(np.minimum(A * ratio, A * 1.2)), rtol=1e-4)


def test_update_raises_good_and_lowers_bad() -> None:
    params = init(CONFIG, jax.random.key(0))
    samples = dataclasses.replace(random_samples(2), advantage=jnp.array([1.0, -1.0]))
    optimizer = adamw(optax.constant_schedule(1e-2), 0.9, 0.95, 0.01, 1.0)
    state = TrainState(params, optimizer.init(params), params, jnp.int32(0))
    step = jax.jit(lambda s, x: update(NETWORK, LOSS, optimizer, EmaPlan(0.9), 2, s, s.params, x))
    before, _ = token_mean_logps(NETWORK, params, samples.prompt_ids, samples.noisy, samples.action)
    samples = dataclasses.replace(samples, frozen={"ref_logp": before})
    after, metrics = step(state, samples)
    logp, _ = token_mean_logps(NETWORK, after.params, samples.prompt_ids, samples.noisy, samples.action)
    assert float(logp[0]) > float(before[0])
    assert float(logp[1]) < float(before[1])
    assert int(after.step) == 1
    assert float(metrics["grad_norm"]) > 0
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), after.ema, ema)


def test_the_average_follows_every_third_step_only() -> None:
    params, samples = init(CONFIG, jax.random.key(0)), random_samples()
    optimizer = adamw(optax.constant_schedule(1e-2), 0.9, 0.95, 0.01, 1.0)
    state = TrainState(params, optimizer.init(params), params, jnp.int32(0))
    plan = EmaPlan(decay=0.5, every=3)
    step = jax.jit(lambda s: update(NETWORK, LOSS, optimizer, plan, 8, s, s.params, samples)[0])
    expected = params
    for count in range(1, 8):
        state = step(state)
        if count % 3 == 0:
            expected = jax.tree.map(lambda slow, fast: 0.5 * slow + 0.5 * fast, expected, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.ema, expected)
    assert not np.array_equal(state.ema["lm_head"]["kernel"], params["lm_head"]["kernel"])


def test_minibatches_are_a_random_partition_that_the_key_decides() -> None:
    parts = np.asarray(split_images(jax.random.key(0), 12, 3))
    assert parts.shape == (3, 4)
    assert sorted(parts.reshape(-1)) == list(range(12))
    np.testing.assert_array_equal(parts, split_images(jax.random.key(0), 12, 3))
    assert (parts != np.asarray(split_images(jax.random.key(1), 12, 3))).any()
    halves = [set(np.asarray(split_images(jax.random.key(seed), 4, 2))[0].tolist()) for seed in range(40)]
    assert {frozenset(half) for half in halves} == {frozenset((i, j)) for i in range(4) for j in range(i)}


def test_a_minibatch_has_all_steps_of_its_images_and_padding_of_weight_0() -> None:
    """The rollout has two steps of four images, whose eight states are padded to nine."""
    samples = random_samples(9, old=True)
    samples = dataclasses.replace(samples, weight=jnp.array([1.0] * 8 + [0.0]))
    chosen = jnp.array([3, 1], jnp.int32)
    whole = of_images(samples, chosen, images=4, states=8, rows=4)
    padded = of_images(samples, chosen, images=4, states=8, rows=6)
    for part, rows in ((whole, [3, 1, 7, 5]), (padded, [3, 1, 7, 5, 5, 5])):
        for name in ("prompt_ids", "noisy", "action", "advantage"):
            np.testing.assert_array_equal(getattr(part, name), getattr(samples, name)[np.array(rows)], err_msg=name)
        for name in ("ref_logp", "old_logp"):
            np.testing.assert_array_equal(part.frozen[name], samples.frozen[name][np.array(rows)], err_msg=name)
    assert whole.weight is None
    np.testing.assert_array_equal(padded.weight, [1, 1, 1, 1, 0, 0])


def test_minibatch_steps_are_those_of_a_direct_computation() -> None:
    """Two passes of two steps use the gradients of the paper's loss, with log-probs of the first policy as old ones."""
    params, samples = init(CONFIG, jax.random.key(0)), random_samples()
    optimizer = optax.sgd(0.5)  # linear in the gradient: Adam turns rounding errors of zero gradients into large steps

    @jax.jit
    def logps(p: dict, part: Samples) -> jax.Array:
        return token_mean_logps(NETWORK, p, part.prompt_ids, part.noisy, part.action)[0]

    first = logps(params, samples)
    samples = dataclasses.replace(samples, frozen={"old_logp": first, "ref_logp": first + 0.01})

    @jax.jit
    @jax.value_and_grad
    def direct(p: dict, mine: Samples) -> jax.Array:
        now = logps(p, mine)
        r, A, ref = jnp.exp(now - mine.frozen["old_logp"]), mine.advantage, mine.frozen["ref_logp"] - now
        surrogate = jnp.minimum(A * r, A * jnp.clip(r, 1 - LOSS.clip_range, 1 + LOSS.clip_range))
        return jnp.mean(-surrogate + LOSS.kl_weight * (jnp.exp(ref) - ref - 1))

    step = jax.jit(lambda s, x: update(NETWORK, LOSS, optimizer, EmaPlan(), 2, s, s.params, x))
    state = TrainState(params, optimizer.init(params), None, jnp.int32(0))
    expected, moments, outside = params, state.opt_state, []
    for turn in range(2):
        for chosen in split_images(jax.random.key(turn), 4, 2):
            rows = np.concatenate([chosen, chosen + 4])
            loss, gradient = direct(expected, jax.tree.map(lambda leaf: leaf[rows], samples))  # noqa: B023
            expected, moments, _ = optimizer_step(optimizer, gradient, moments, expected)
            state, metrics = step(state, of_images(samples, chosen, images=4, states=8, rows=4))
            np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-3)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), state.params, expected)
            outside.append(float(jnp.max(jnp.abs(logps(state.params, samples) - samples.frozen["old_logp"]))))
    assert int(state.step) == 4
    assert min(outside) > 1e-3  # the policy has moved away from the one that drew the images


def test_bfloat16_compute_keeps_float32_masters() -> None:
    params = init(CONFIG, jax.random.key(0))
    optimizer = adamw(optax.constant_schedule(1e-4), 0.9, 0.95, 0.01, 1.0)
    state = TrainState(params, optimizer.init(params), None, jnp.int32(0))
    step = jax.jit(partial(update, NETWORK, LOSS, optimizer, EmaPlan(), 4))
    after, metrics = step(state, cast(params, jnp.bfloat16), random_samples())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))
    _, exact_metrics = step(state, params, random_samples())
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=0.05)
    np.testing.assert_allclose(metrics["grad_norm"], exact_metrics["grad_norm"], rtol=0.1)


def test_window_is_uniform_over_its_starts() -> None:
    plan = TrajectoryPlan(steps=10, shift=1.0)
    starts = [int(window(plan, jax.random.key(seed))[0]) for seed in range(60)]
    assert set(starts) == {0, 1, 2}
    np.testing.assert_array_equal(np.diff(window(plan, jax.random.key(0))), [1, 1])


def _kept_rollout() -> Rollout:
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.integers(0, 40, shape), jnp.int32)  # noqa: E731
    return Rollout(clean=draw(4, 6), visited=draw(10, 4, 6), predicted=draw(10, 4, 6))


def test_the_four_trajectories() -> None:
    path = make_path(jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32), 0.9, 3.0)
    kept, index = _kept_rollout(), jnp.arange(4, dtype=jnp.int32)
    trajectories = {
        (where, action): trajectory(
            path, TrajectoryPlan(10, 1.0, trajectory=where, action=action, rows=2), kept, index, jax.random.key(1)
        )
        for where in ("forward", "rollout")
        for action in ("clean", "intermediate")
    }
    steps = np.asarray(window(TrajectoryPlan(10, 1.0), jax.random.split(jax.random.key(1))[0]))
    for (where, action), states in trajectories.items():
        expected = np.broadcast_to(kept.clean, (3, 4, 6)) if action == "clean" else np.asarray(kept.predicted)[steps]
        np.testing.assert_array_equal(states.action, expected)
        if where == "rollout":
            np.testing.assert_array_equal(states.noisy, np.asarray(kept.visited)[steps])
    assert (trajectories["forward", "clean"].noisy != trajectories["rollout", "clean"].noisy).any()
    with pytest.raises(ValueError, match="keep its trajectory"):
        trajectory(path, TrajectoryPlan(10, 1.0, trajectory="rollout"), Rollout(kept.clean), index, jax.random.key(1))


def test_forward_trajectory_follows_the_path() -> None:
    """Late states are close to the clean image, and the draws of an image do not depend on its neighbours."""
    path = make_path(jnp.asarray(np.random.default_rng(0).normal(size=(40, 6)), jnp.float32), 0.9, 3.0)
    clean = jnp.asarray(np.random.default_rng(6).integers(0, 40, (64, 6)), jnp.int32)
    index = jnp.arange(64, dtype=jnp.int32)
    plan = TrajectoryPlan(25, 1.0, trained_steps=25, window_starts=1, rows=16)
    states = trajectory(path, plan, Rollout(clean), index, jax.random.key(2))
    same = np.asarray(jnp.mean((states.noisy == clean[None]).astype(jnp.float32), axis=(1, 2)))
    assert same[0] < 0.1
    assert same[-1] > 0.9
    alone = trajectory(path, plan, Rollout(clean[10:12]), index[10:12], jax.random.key(2))
    np.testing.assert_array_equal(alone.noisy, states.noisy[:, 10:12])


def test_schedules() -> None:
    warm = learning_rate(1.0, "constant", 100, warmup=4)
    np.testing.assert_allclose([warm(i) for i in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])
    cosine = learning_rate(1.0, "cosine", 10, final_fraction=0.1)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10)], [1, 0.55, 0.1], rtol=1e-6)
    steps = learning_rate(1.0, "multistep", 10, warmup=2, milestones=(4, 8), milestone_factor=0.5)
    np.testing.assert_allclose([steps(i) for i in (2, 3, 4, 7, 8)], [1, 1, 0.5, 0.5, 0.25], rtol=1e-6)
    with pytest.raises(ValueError, match="constant, cosine or multistep"):
        learning_rate(1.0, "linear", 10)

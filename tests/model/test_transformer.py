"""Tests of the transformer: golden logits and losses, execution options, and refused sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import GoldenCase, assert_close, first_case, golden_cases
from golden_model import load_model

from udm_grpo.diffusion.pretrain import cross_entropy
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.transformer import abstract, head, hidden_states, image_features, image_rows, init, input_ids

TINY = TransformerConfig(32, 48, 2, 1, 2, 1e6, 30, 10, 20, 2)


@golden_cases()
def test_logits(case: GoldenCase) -> None:
    model = load_model(case)
    prompts, images = model.ids("prompt_ids"), model.ids("image_ids")
    hidden = hidden_states(model.config, model.params, prompts, images, model.grid)
    cond = head(model.params, image_rows(hidden, model.tokens))
    assert_close(cond, case.arrays["logits_image"])
    assert_close(head(model.params, hidden[0]), case.arrays["logits_all_row0"])
    hidden = hidden_states(model.config, model.params, model.ids("empty_prompt_ids"), images, model.grid)
    uncond = head(model.params, image_rows(hidden, model.tokens))
    assert_close(uncond + 3 * (cond - uncond), case.arrays["guided_logits_scale3"])


@golden_cases()
def test_input_ids(case: GoldenCase) -> None:
    model = load_model(case)
    ids = input_ids(model.config, model.ids("prompt_ids"), model.ids("image_ids"))
    np.testing.assert_array_equal(ids, case.arrays["input_ids"])


@golden_cases()
def test_pretraining_loss(case: GoldenCase) -> None:
    model = load_model(case)
    prompts = model.ids("grpo_input_ids")[:, : case.setup["L"]]
    network = Network(model.config, model.grid)
    loss = cross_entropy(network, model.params, prompts, model.ids("grpo_noisy"), model.ids("grpo_clean"))
    assert_close(loss, case.arrays["pretrain_ce"])


def test_abstract_equals_init() -> None:
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init(TINY, jax.random.key(0)))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract(TINY))


def _loss(params: dict, execution: Execution) -> jax.Array:
    prompts = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    images = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    return jnp.mean(hidden_states(TINY, params, prompts, images, (2, 2), execution) ** 2)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat: str) -> None:
    params = init(TINY, jax.random.key(0))
    plain = jax.jit(jax.grad(lambda p: _loss(p, Execution())))(params)
    again = jax.jit(jax.grad(lambda p: _loss(p, Execution(remat=remat))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_last_block_of_image_rows_alone_changes_nothing(remat: str) -> None:
    """Neither the features nor the gradient, beyond rounding."""
    params = init(TINY, jax.random.key(0))
    ids = jnp.arange(6, dtype=jnp.int32).reshape(2, 3), jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    weight = jax.random.normal(jax.random.key(1), (2, 4, 32))
    execution = Execution(remat=remat)

    def whole(params: dict) -> tuple[jax.Array, jax.Array]:
        features = image_rows(hidden_states(TINY, params, *ids, (2, 2), execution), 4)
        return jnp.sum(weight * features), features

    def short(params: dict) -> tuple[jax.Array, jax.Array]:
        features = image_features(TINY, params, *ids, (2, 2), execution)
        return jnp.sum(weight * features), features

    costs = [jax.jit(fn).lower(params).compile().cost_analysis()["flops"] for fn in (whole, short)]
    assert costs[1] < 0.85 * costs[0]
    results = [jax.jit(jax.grad(fn, has_aux=True))(params) for fn in (whole, short)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize(("layers", "loops"), [(28, 1), (8, 0)])
def test_only_a_deep_model_loops_over_its_blocks(layers: int, loops: int) -> None:
    config = dataclasses.replace(TINY, num_hidden_layers=layers)
    ids = [jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (3, 4)]
    program = jax.jit(lambda params, *ids: image_features(config, params, *ids, (2, 2)))
    assert program.lower(abstract(config), *ids).as_text().count("stablehlo.while") == loops


def test_left_padding_takes_part() -> None:
    case = first_case()
    model = load_model(case)
    prompts, images = model.ids("prompt_ids"), model.ids("image_ids")
    plain = hidden_states(model.config, model.params, prompts, images, model.grid)
    other = hidden_states(model.config, model.params, prompts.at[:, 0].set(5), images, model.grid)
    assert float(jnp.abs(plain - other)[:, -1].max()) > 1e-4


def test_bfloat16_is_near_float32() -> None:
    model = load_model(first_case())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    prompts, images = model.ids("prompt_ids"), model.ids("image_ids")
    logits = head(half, image_rows(hidden_states(model.config, half, prompts, images, model.grid), model.tokens))
    assert logits.dtype == jnp.float32
    assert_close(logits, model.case.arrays["logits_image"], tolerance=0.05)


def test_bad_sizes_are_named() -> None:
    raw = dict(zip(TransformerConfig.__dataclass_fields__, (32, 48, 2, 1, 2, 1e6, 30, 10, 20, 2), strict=True))
    with pytest.raises(ValueError, match=r"lacks bov_token_id"):
        TransformerConfig.from_json({name: value for name, value in raw.items() if name != "bov_token_id"})
    with pytest.raises(ValueError, match=r"10 \+ 21"):
        TransformerConfig.from_json(raw | {"lm_head_size": 21})
    with pytest.raises(ValueError, match=r"not a multiple"):
        TransformerConfig.from_json(raw | {"num_attention_heads": 3, "num_key_value_heads": 2})
    bad = {"num_hidden_layers": 300_000, "hidden_size": 0, "lm_head_size": True, "vocab_size": "30", "rope_theta": "x"}
    with pytest.raises(ValueError, match="damaged or not of this model") as caught:
        TransformerConfig.from_json(raw | bad)
    for name, value in bad.items():
        assert f"{name} is {value!r}, expected" in str(caught.value)
    params = init(TINY, jax.random.key(0))
    with pytest.raises(ValueError, match=r"grid is 2 x 3"):
        hidden_states(TINY, params, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 4), jnp.int32), (2, 3))
    with pytest.raises(ValueError, match=r"remat is 'some'"):
        _loss(init(TINY, jax.random.key(0)), Execution(remat="some"))


def test_no_wide_logits_in_the_program() -> None:
    """The head is applied to the N image rows only: the program has no array of shape (B, L+1+N, V)."""
    config = TransformerConfig(32, 48, 2, 1, 2, 1e6, 10 + 77, 10, 77, 2)
    shape = (jax.ShapeDtypeStruct((3, 5), jnp.int32), jax.ShapeDtypeStruct((3, 4), jnp.int32))
    program = jax.jit(lambda p, a, b: head(p, image_rows(hidden_states(config, p, a, b, (2, 2)), 4))).lower(
        abstract(config), *shape
    )
    text = program.as_text()
    assert "3x4x77x" in text
    assert "3x10x77x" not in text

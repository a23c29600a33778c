"""Tests of the choice of an attention kernel by device, of refused kernels, and of padding rows for a kernel."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import first_case
from golden_model import load_model

from udm_grpo.config import ConfigError, ModelConfig
from udm_grpo.model.attention import choose
from udm_grpo.model.blocks import attend
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.transformer import hidden_states, init

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", device_kind="Tesla V100-SXM2-16GB", compute_capability="7.0")
AMD = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        (CPU, "bfloat16", "xla", "no kernel for cpu"),
        (TPU, "bfloat16", "splash", "TPU v5 lite"),
        (TPU, "float32", "splash", "TPU v5 lite"),
        (H100, "bfloat16", "cudnn", "NVIDIA H100"),
        (H100, "float32", "xla", "model.dtype is float32"),
        (V100, "bfloat16", "xla", "needs compute capability 8.0, and Tesla V100-SXM2-16GB has 7.0"),
        (AMD, "bfloat16", "xla", "needs NVIDIA GPUs, and the devices are AMD Instinct MI300X"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices(device, dtype, name, reason):
    attention = choose(ModelConfig(dtype=dtype), device)
    assert attention.name == name
    assert reason in attention.reason
    assert choose(ModelConfig(attention="xla", dtype=dtype), device).name == "xla"


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "said"),
    [
        ("cudnn", CPU, "bfloat16", "model.attention is cudnn, but cuDNN needs NVIDIA GPUs, and the devices are cpu"),
        ("cudnn", TPU, "bfloat16", "the devices are TPU v5 lite"),
        ("cudnn", AMD, "bfloat16", "the devices are AMD Instinct MI300X"),
        ("cudnn", V100, "bfloat16", "has 7.0"),
        ("cudnn", H100, "float32", "computes in bfloat16, and model.dtype is float32"),
        ("splash", CPU, "bfloat16", "model.attention is splash, but splash is for TPUs, and the devices are cpu"),
        ("splash", H100, "bfloat16", "the devices are NVIDIA H100"),
    ],
)
def test_what_the_devices_cannot_run_is_refused(attention, device, dtype, said):
    with pytest.raises(ConfigError) as error:
        choose(ModelConfig(attention=attention, dtype=dtype), device)
    assert "set model.attention=auto" in str(error.value)
    assert said in str(error.value)


def test_only_cudnn_adds_a_row_and_only_to_odd_sequences():
    assert [Execution("cudnn").padded_rows(rows) for rows in (1344, 1345, 1346)] == [1344, 1346, 1346]
    assert Execution("xla").padded_rows(1345) == Execution("splash").padded_rows(1345) == 1345


@pytest.mark.usefixtures("compiled_quickly")
def test_an_added_row_changes_neither_output_nor_gradient():
    """As with cudnn, the row is present in every layer, and no row attends to it."""
    config, grid = TransformerConfig(32, 48, 2, 1, 2, 1e6, 30, 10, 20, 2), (2, 2)
    params = init(config, jax.random.key(0))
    prompts, images = jnp.arange(6, dtype=jnp.int32).reshape(2, 3), jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    weight = jax.random.normal(jax.random.key(1), (2, 8, 32))  # S = 3 + 1 + 4

    def loss(params, execution):
        hidden = hidden_states(config, params, prompts, images, grid, execution)
        return jnp.sum(weight * hidden), hidden

    padded = Execution(multiple=9)
    assert padded.padded_rows(8) == 9
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, expected), expected_gradients = gradient(params, Execution())
    (_, result), gradients = gradient(params, padded)
    for one, other in zip(
        jax.tree.leaves((result, gradients)), jax.tree.leaves((expected, expected_gradients)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(other))))


def test_added_rows_leave_the_golden_model_as_it_is():
    model = load_model(first_case())
    ids = model.ids("prompt_ids"), model.ids("image_ids")
    expected = hidden_states(model.config, model.params, *ids, model.grid)
    padded = hidden_states(model.config, model.params, *ids, model.grid, Execution(multiple=expected.shape[1] + 1))
    np.testing.assert_allclose(padded, expected, rtol=1e-4, atol=1e-5)


def test_keys_past_the_rows_are_not_seen():
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (jax.random.normal(key, (1, 6, heads, 128)) for key, heads in zip(keys, (2, 1, 1), strict=True))
    mixed = attend(q, k, v, Execution(), 5)
    assert mixed.shape == q.shape
    np.testing.assert_allclose(mixed[:, :5], attend(q[:, :5], k[:, :5], v[:, :5], Execution()), rtol=1e-5, atol=1e-6)
    assert np.isfinite(mixed).all()
    np.testing.assert_array_equal(mixed, attend(q, k.at[:, 5].set(9.0), v.at[:, 5].set(9.0), Execution(), 5))

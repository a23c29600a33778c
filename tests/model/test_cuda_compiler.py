"""Tests with JAX's CUDA compiler, which needs no GPU: cuDNN's attention has a gradient, the published update compiles.

Skipped if the plugin is not installed: pip install "jax[cuda13]" (3.8 GB). JAX checks cuDNN's version while tracing;
without a GPU it finds the plugin's own library, so nothing has to be mocked.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from running import ROOT

from udm_grpo.compile_check import programs, topology
from udm_grpo.configuration.command_line import parse
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.transformer import abstract, hidden_states

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    and not os.environ.get("UDM_GRPO_REQUIRE_CUDA_COMPILER"),
    reason='the CUDA compiler is not installed: pip install "jax[cuda13]"',
)

BACKWARD = "__cudnn$fmhaSoftmaxBackward"
"""XLA's name for the gradient of cuDNN's attention."""


@pytest.mark.parametrize(
    ("name", "kind", "memory"), [("h100", "NVIDIA H100 80GB HBM3", 84929347584), ("h200", "NVIDIA H200", 150754820096)]
)
def test_the_devices_are_described(name, kind, memory):
    devices = topology.devices_of(f"{name}:3")
    assert [device.device_kind for device in devices] == [kind] * 3
    assert topology.usable_bytes(devices[0]) == int(0.75 * memory)
    assert topology.compiler_options(devices[0])["xla_gpu_autotune_level"] == 0
    assert topology.compiler_options(jax.devices()[0]) == {}


@pytest.mark.parametrize("text", [6, 7])
def test_the_gradient_of_odd_and_even_sequences_is_traced(text):
    """Rows are text + 1 + 4; JAX refuses the gradient for an odd number, so one row is added."""
    config = TransformerConfig(256, 48, 2, 1, 2, 1e6, 30, 10, 20, 2)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract(config))
    ids = (jax.ShapeDtypeStruct((2, text), jnp.int32), jax.ShapeDtypeStruct((2, 4), jnp.int32))

    def loss(params, *ids):
        return jnp.sum(hidden_states(config, params, *ids, (2, 2), Execution("cudnn")).astype(jnp.float32))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside jax.nn
        program = str(jax.make_jaxpr(jax.grad(loss))(params, *ids))
    assert "dot_product_attention_bwd" in program
    assert f"bf16[2,{text + 5 + (text + 5) % 2},2,128]" in program


@pytest.mark.parametrize("count", [1, 8])
def test_the_published_update_compiles(count):
    config = parse(["--config", str(ROOT / "configs" / "geneval.py")])
    devices = topology.devices_of(f"h100:{count}")
    sizes = programs.read_sizes(config.model.path, config.model.text_length)
    mesh = programs.mesh_of(config, sizes, devices)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside jax.nn
        lowered = programs.programs(config, sizes, mesh)["update"].trace().lower()
    compiled = lowered.compile(compiler_options=topology.compiler_options(devices[0]))
    assert BACKWARD in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes > 2**30

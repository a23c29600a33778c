"""Budgets of the compiled programs of a run: a change that costs time or memory on every device fails here."""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from golden_data import DEFAULT_ROOT
from jax.extend.core import ClosedJaxpr, Jaxpr

from udm_grpo.compile_check import topology
from udm_grpo.compile_check.hlo_collectives import collectives
from udm_grpo.compile_check.programs import Sizes, device_bytes, mesh_of, programs, read_sizes
from udm_grpo.config import RunConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not os.environ.get("UDM_GRPO_REQUIRE_LIBTPU"),
    reason="the TPU compiler is not installed",
)
ROWS = 2
"""Images whose logits exist at a time."""
TOKENS, CODES = 24, 1000
"""N and V of the small run."""


def small_config(dtype: str) -> RunConfig:
    """Return a run of the tiny golden checkpoint, data-parallel on any number of devices."""
    config = RunConfig()
    config.model.path = str(DEFAULT_ROOT / "a" / "checkpoint")
    config.model.text_length, config.model.height, config.model.width = 7, 16, 24
    config.model.logit_rows, config.model.dtype = ROWS, dtype
    config.rollout.prompts, config.rollout.group_size, config.rollout.steps = 4, 4, 5
    config.rollout.micro_batch = config.optimizer.micro_batch = config.evaluation.batch = 16
    return config


def small_sizes() -> Sizes:
    """Return the checkpoint's sizes with CODES codes, a length that nothing else has."""
    sizes = read_sizes(small_config("float32").model.path, 7)
    transformer = replace(sizes.transformer, lm_head_size=CODES, vocab_size=sizes.transformer.lm_vocab_size + CODES)
    return replace(sizes, transformer=transformer, vq=replace(sizes.vq, num_vq_embeddings=CODES))


def stages_of(dtype: str, devices: list[Any]) -> dict[str, Any]:
    config, sizes = small_config(dtype), small_sizes()
    return programs(config, sizes, mesh_of(config, sizes, devices))


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Return the traced programs of a bfloat16 run on one device, by name."""
    return {name: stage.trace() for name, stage in stages_of("bfloat16", jax.devices()[:1]).items()}


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield all equations of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    yield from equations(part.jaxpr if isinstance(part, ClosedJaxpr) else part)


@pytest.mark.parametrize("name", ["rollout", "reference", "update"])
def test_no_array_is_wider_than_the_logits_of_a_chunk(traced, name):
    """With V codes, nothing exceeds twice the float32 logits of ROWS images; weights and their gradients aside."""
    limit = 2 * ROWS * TOKENS * CODES * 4
    wide = set()
    for equation in equations(traced[name].jaxpr.jaxpr):
        for variable in equation.outvars:
            shape = tuple(getattr(variable.aval, "shape", ()))
            if CODES in shape and math.prod(shape) * variable.aval.dtype.itemsize > limit:
                wide.add((equation.primitive.name, shape))
    assert not wide


FLOAT32_PRODUCTS = {
    "rollout": {"distances of codes"},
    "reference": {"distances of codes"},
    "update": set(),
}


@pytest.mark.parametrize("name", ["rollout", "reference", "update"])
def test_a_bfloat16_run_multiplies_float32_matrices_only_for_distances_of_codes(traced, name):
    kinds = set()
    for equation in equations(traced[name].jaxpr.jaxpr):
        if equation.primitive.name == "dot_general" and all(v.aval.dtype == jnp.float32 for v in equation.invars):
            shapes = [tuple(variable.aval.shape) for variable in equation.invars]
            codebook = sorted((CODES, small_sizes().vq.vq_embed_dim))
            of_codes = any(sorted(shape[-2:]) == codebook for shape in shapes)
            kinds.add("distances of codes" if of_codes else str(shapes))
    assert kinds == FLOAT32_PRODUCTS[name]


def test_an_update_reuses_the_memory_of_the_state():
    update = stages_of("float32", jax.devices()[:1])["update"]
    memory = update.trace().lower().compile().memory_analysis()
    state = device_bytes(update.present[0]["state"])
    assert memory.alias_size_in_bytes >= 0.99 * state


@needs_libtpu
@pytest.mark.parametrize("mesh", [(4, 1), (1, 4)], ids=["data", "fsdp"])
def test_collectives_of_a_run_with_whole_copies(mesh):
    """Four TPUs: a rollout and its pictures exchange nothing, an update its gradients and metrics."""
    devices = topology.devices_of("v5e:2x2")
    config, sizes = small_config("bfloat16"), small_sizes()
    config.mesh.data, config.mesh.fsdp = mesh
    stages = programs(config, sizes, mesh_of(config, sizes, devices))
    counts = {name: collectives(one.trace().lower().compile().as_text()) for name, one in stages.items()}
    assert counts["rollout"] == counts["decode"] == {}
    assert sum(one.bytes for one in counts["reference"].values()) < 1 << 16  # of the random draws of its states
    parameters = stages["update"].present[0]["state"].params
    # Every device adds up the gradients of its states in float32. Some versions of the compiler gather a few small
    # arrays, too.
    once = sum(4 * leaf.size for leaf in jax.tree.leaves(parameters))
    exchanged = sum(one.bytes for one in counts["update"].values())
    sums = sum(one.bytes for kind, one in counts["update"].items() if kind in ("all-reduce", "reduce-scatter"))
    assert once <= sums <= exchanged < 1.05 * once

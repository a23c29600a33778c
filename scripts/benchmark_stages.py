"""The stages that scripts/benchmark.py times: a run's compiled programs on random weights and inputs."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rewards_bridge.errors import UserError
from udm_grpo import compiled
from udm_grpo import mesh as meshes
from udm_grpo.batches import Params, Rollout, Samples, TrainState
from udm_grpo.compile_check.flops import matrix_flops
from udm_grpo.compile_check.programs import Sizes, device_bytes, mesh_of, read_sizes
from udm_grpo.config import RunConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.diffusion.rollout import step_times
from udm_grpo.model import transformer
from udm_grpo.model.vq import codec as vq
from udm_grpo.run import abstract_state, optimizer_of

SIZES = ("shapes", "0.6b", "1.7b")
SAMPLER_ROWS = 64
"""Tokens of the sampler stage: few, so that a large vocabulary fits any device."""
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """A run's compiled programs and their static configuration."""

    config: RunConfig
    sizes: Sizes
    mesh: Mesh
    steps: compiled.Steps
    path: ProbabilityPath


@dataclass
class Arrays:
    """The inputs of the stages. The update donates the training state and stores the next one here."""

    state: TrainState
    policy: Params
    tokenizer: Params
    prompt_ids: jax.Array
    empty_ids: jax.Array
    clean: jax.Array
    """Codes of a rollout, i32[B,N]."""
    samples: Samples
    score: jax.Array


@dataclass(frozen=True)
class Stage:
    """A piece of work to time."""

    name: str
    run: Callable[[], Any]
    """Starts the work and returns its results, which may not be ready yet."""
    images: int
    """Images, or training states, of one call."""
    steps: int = 1
    """Denoising steps of each image."""
    flops: int = 0
    """Operations of the matrix products of one call, on all devices; 0: not counted."""


def configuration(size: str) -> tuple[RunConfig, Sizes]:
    """Return the configuration and the model sizes of one of SIZES; weights are never read."""
    if size == "shapes":
        config = parse(["--config", "configs/shapes.py"])
        return config, read_sizes(config.model.path)
    config = parse(["--config", "configs/geneval.py"])
    sizes = read_sizes("models/URSA-1.7B-IBQ512")
    if size == "0.6b":
        smaller = replace(sizes.transformer, hidden_size=1024, intermediate_size=3072)
        sizes = replace(sizes, transformer=smaller)
    return config, sizes


def open_setting(size: str, rollout_batch: int = 0, update_batch: int = 0) -> Setting:
    """Return the setting of a size; micro-batches of 0 stand for the configuration's own.

    Raises UserError, with the arithmetic, if the weights, gradients and optimizer state do not fit the devices.
    """
    config, sizes = configuration(size)
    config.rollout.micro_batch = rollout_batch or config.rollout.micro_batch
    config.optimizer.micro_batch = update_batch or config.optimizer.micro_batch
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"
    mesh = mesh_of(config, sizes, jax.devices())
    optimizer = optimizer_of(config)
    abstract = abstract_state(optimizer, transformer.abstract(sizes.transformer), False, mesh)
    check_memory(size, abstract, jnp.dtype(config.model.dtype).itemsize)
    plans = compiled.make_plans(config, sizes.transformer, sizes.vq, sizes.scheduler.shift, mesh)
    codebook = jax.random.normal(jax.random.key(1), (sizes.transformer.lm_head_size, sizes.vq.vq_embed_dim))
    path = make_path(codebook, sizes.scheduler.alpha, sizes.scheduler.c, sizes.scheduler.eps)
    path = jax.device_put(path, meshes.replicated(mesh))
    return Setting(config, sizes, mesh, compiled.build(config, plans, path, optimizer, mesh, abstract), path)


def check_memory(size: str, state: TrainState, item_bytes: int) -> None:
    """Raise UserError if a device has too little memory for the arrays that it holds throughout an iteration."""
    weights = device_bytes(state.params)
    copies = 2 * weights * item_bytes // 4
    needed, present = device_bytes(state) + weights + copies, memory_of_a_device()
    if needed > present:
        parts = f"{device_bytes(state) / GIB:.1f} master weights and moments + {weights / GIB:.1f} gradients"
        raise UserError(
            f"--size {size} needs {needed / GIB:.1f} GiB on every device ({parts} + {copies / GIB:.1f} policy and "
            f"reference), before any activations, and a device has {present / GIB:.1f}; choose a smaller size or more "
            "devices."
        )


def memory_of_a_device() -> int:
    """Return the memory of a device in bytes; a virtual CPU device has an equal share of the free memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def draw_arrays(setting: Setting) -> Arrays:
    """Return random weights and inputs on the devices."""
    sizes, mesh, steps = setting.sizes, setting.mesh, setting.steps
    abstract = transformer.abstract(sizes.transformer)
    params = jax.device_put(_random(abstract, jax.random.key(0)), meshes.shardings(mesh, abstract))
    state = steps.begin(params)
    policy = steps.compute_copy(state.params)
    over_batch, whole = meshes.over_batch(mesh), meshes.replicated(mesh)
    batches, rng = steps.sizes, np.random.default_rng(0)

    def ids(high: int, *shape: int) -> jax.Array:
        return jax.device_put(rng.integers(0, high, shape).astype(np.int32), over_batch)

    prompt_ids = ids(sizes.transformer.lm_vocab_size, batches.drawn, sizes.text_length)
    clean = ids(setting.path.codes, batches.drawn, steps.plans.network.tokens)
    shape = (setting.config.rollout.prompts, setting.config.rollout.group_size)
    return Arrays(
        state=state,
        policy=policy,
        tokenizer=jax.device_put(vq.init(sizes.vq, jax.random.key(2)), whole),
        prompt_ids=prompt_ids,
        empty_ids=jax.device_put(np.zeros(sizes.text_length, np.int32), whole),
        clean=clean,
        samples=steps.prepare(policy, policy, prompt_ids, Rollout(clean), jax.random.key(3)),
        score=jax.device_put(rng.normal(size=shape).astype(np.float32), whole),
    )


def _random(abstract: Params, key: jax.Array) -> Params:
    """Return weights at the scale of a freshly initialised model: matrices of 0.02, norms of 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jnp.ones(leaf.shape) if path[-1].key == "scale" else 0.02 * jax.random.normal(each, leaf.shape)
        for (path, leaf), each in zip(leaves, keys, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, drawn)


def stages(setting: Setting, arrays: Arrays) -> list[Stage]:
    """Return the stages in the order in which they are timed."""
    steps, plans = setting.steps, setting.steps.plans
    m = steps.sizes.rollout
    index = jax.device_put(np.arange(m, dtype=np.int32), meshes.over_batch(setting.mesh))
    few = jax.device_put((arrays.prompt_ids[:m], arrays.clean[:m]), meshes.over_batch(setting.mesh))
    forward = compiled.features(plans.network)
    decoding = (arrays.tokenizer, few[1])

    def drawing() -> tuple[Any, ...]:  # a function, since a key may be used only once
        return arrays.policy, few[0], arrays.empty_ids, index, jax.random.key(4)

    def judging() -> tuple[Any, ...]:
        return arrays.policy, arrays.policy, arrays.prompt_ids, Rollout(arrays.clean), jax.random.key(3)

    passes = plans.rollout.steps - plans.rollout.first_step(setting.path)

    def update() -> Any:
        arrays.state, metrics = steps.update(arrays.state, arrays.policy, arrays.samples, arrays.score)
        return metrics

    learning = (arrays.state, arrays.policy, arrays.samples, arrays.score)
    return [
        _sampler(setting),
        Stage("forward", lambda: forward(arrays.policy, *few), m, 1, _flops(forward, (arrays.policy, *few))),
        Stage("rollout", lambda: steps.rollout(*drawing()), m, passes, _flops(steps.rollout, drawing())),
        Stage("decode", lambda: steps.decode(*decoding), m, 1, _flops(steps.decode, decoding)),
        Stage("reference", lambda: steps.prepare(*judging()), steps.sizes.trained, 1, _flops(steps.prepare, judging())),
        Stage("update", update, steps.sizes.trained, 1, _flops(steps.update, learning)),
        Stage("iteration", lambda: _iteration(setting, arrays), steps.sizes.images, 1),
    ]


def _sampler(setting: Setting) -> Stage:
    """Return the stage of one sampler step for SAMPLER_ROWS tokens, in the middle of a rollout."""
    plan, rows = setting.steps.plans.rollout, SAMPLER_ROWS
    times = {name: jnp.asarray(value[plan.steps // 2]) for name, value in step_times(setting.path, plan).items()}
    logits = jax.random.normal(jax.random.key(5), (rows, setting.path.codes))
    z, u = jnp.arange(rows, dtype=jnp.int32), jax.random.uniform(jax.random.key(6), (rows, 5))
    step = compiled.sampler()
    return Stage("sampler", lambda: step(setting.path, logits, z, times, u), rows)


def _iteration(setting: Setting, arrays: Arrays) -> Any:
    """Queue the device work of an iteration as the training loop does; the scores are known from the start."""
    steps, m = setting.steps, setting.steps.sizes.rollout
    policy = steps.compute_copy(arrays.state.params)
    parts, pictures = [], []
    for first in range(0, steps.sizes.drawn, m):
        index = jnp.arange(first, first + m, dtype=jnp.int32)
        ids = arrays.prompt_ids[first : first + m]
        parts.append(steps.rollout(policy, ids, arrays.empty_ids, index, jax.random.key(7)).clean)
        pictures.append(steps.decode(arrays.tokenizer, parts[-1]))
    rolled = Rollout(jnp.concatenate(parts))
    samples = steps.prepare(policy, arrays.policy, arrays.prompt_ids, rolled, jax.random.key(8))
    arrays.state, metrics = steps.update(arrays.state, policy, samples, arrays.score)
    return pictures, metrics


def _flops(step: Any, arguments: tuple[Any, ...]) -> int:
    jitted: Any = step.func if isinstance(step, partial) else step
    bound = step.args if isinstance(step, partial) else ()
    return matrix_flops(jitted.trace(*bound, *arguments).jaxpr.jaxpr)


def described(setting: Setting) -> dict[str, Any]:
    """Return the report's description of the setting."""
    device = setting.mesh.devices.flat[0]
    network = setting.steps.plans.network
    return {
        "devices": setting.mesh.devices.size,
        "kind": device.device_kind,
        "platform": device.platform,
        "dtype": setting.config.model.dtype,
        "attention": network.execution.attention,
        "transformer": asdict(network.config),
        "text_length": setting.sizes.text_length,
        "grid": list(network.grid),
        "batches": asdict(setting.steps.sizes),
    }

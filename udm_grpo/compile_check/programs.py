"""The programs of a run for shapes instead of arrays: neither weights nor the devices have to be present."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from udm_grpo import mesh as meshes
from udm_grpo.batches import Rollout, Samples
from udm_grpo.compiled import Steps, build, make_plans
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.data.tokenizer import MAX_LENGTH, load_tokenizer
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.model import lora, transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.vq import codec as vq
from udm_grpo.model.vq.config import VQConfig
from udm_grpo.released.contents import CONFIG_FILES, Scheduler
from udm_grpo.released.weights import ReleasedModel
from udm_grpo.run import abstract_state, check_sizes, optimizer_of, trained
from udm_grpo.tensor_files.torch_files import read_json

ASSETS = Path(__file__).resolve().parents[1] / "assets"


@dataclass(frozen=True)
class Sizes:
    """The sizes in the configuration files of a released folder."""

    folder: Path
    """Where they were read from."""
    transformer: TransformerConfig
    vq: VQConfig
    scheduler: Scheduler
    text_length: int
    """L."""


def read_sizes(path: str, text_length: int = 0) -> Sizes:
    """Return the sizes of the released folder `path`; for a published model that is not there, those in the package.

    `text_length` is L; 0 takes that of the tokenizer. Raises ConfigError, or WeightsError for a damaged file.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = ASSETS / folder.name.lower()
    if not (folder / CONFIG_FILES[0]).is_file():
        raise ConfigError(
            f"model.path: there is no folder {path}, and the package has no sizes for {Path(path).name}; name a "
            f"folder that holds {', '.join(CONFIG_FILES)}."
        )
    raw = [read_json(folder / name) for name in CONFIG_FILES]
    if not text_length:
        tokenizer = folder / "tokenizer"
        text_length = load_tokenizer(tokenizer).length if tokenizer.is_dir() else MAX_LENGTH
    try:
        parts = TransformerConfig.from_json(raw[0]), VQConfig.from_json(raw[1]), Scheduler.from_json(raw[2])
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from error
    return Sizes(folder, *parts, text_length)


def sizes_of(released: ReleasedModel, folder: str) -> Sizes:
    """Return the sizes of a model that is loaded from a folder."""
    return Sizes(
        Path(folder), released.transformer_config, released.vq_config, released.scheduler, released.tokenizer.length
    )


@dataclass(frozen=True)
class Program:
    """A stage of a run before compilation."""

    name: str
    micro_batch: int
    """Images or states that it processes at a time, on all devices together."""
    trace: Callable[[], Any]
    """Returns a jax.stages.Traced."""
    present: Any
    """Shapes of everything on the devices meanwhile, including the arguments."""


def mesh_of(config: RunConfig, sizes: Sizes, devices: list[Any]) -> Mesh:
    """Return the mesh of a run over `devices`.

    Raises MeshError or ConfigError if the image, the sizes and the mesh do not fit together.
    """
    mesh = meshes.make_mesh(asdict(config.mesh), devices)
    check_sizes(config, sizes.vq.stride)
    return mesh


def programs(config: RunConfig, sizes: Sizes, mesh: Mesh) -> dict[str, Program]:
    """Return the programs of one iteration by name: rollout, decode, reference and update."""
    held, steps = _held(config, sizes, mesh)
    batches = _batches(config, sizes, mesh, steps)
    samples = _samples(held, batches, steps, mesh)
    rollout, update = steps.sizes.rollout, steps.sizes.update

    def program(name: str, step: Any, micro_batch: int, taken: tuple[str, ...], *rest: Any) -> Program:
        # A stage may carry its path: partial(jitted, path).
        jitted: Any = step.func if isinstance(step, partial) else step
        bound = step.args if isinstance(step, partial) else ()
        arguments = (*bound, *(held[part] for part in taken), *rest)
        return Program(name, micro_batch, lambda: jitted.trace(*arguments), (held, rest))

    drawn = (batches["rollout prompts"], batches["empty"], batches["index"], batches["key"])
    judged = (
        batches["prompts"],
        Rollout(batches["clean"], batches["trajectory"], batches["trajectory"]),
        batches["key"],
    )
    learned = (samples, batches["score"], batches["images"])
    stages = (
        program("rollout", steps.rollout, rollout, ("policy",), *drawn),
        program("decode", steps.decode, rollout, ("tokenizer",), batches["rollout clean"]),
        program("reference", steps.prepare, update, ("policy", "reference"), *judged),
        program("update", steps.update, update, ("state", "policy"), *learned),
    )
    return {one.name: one for one in stages}


def _spread(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _held(config: RunConfig, sizes: Sizes, mesh: Mesh) -> tuple[dict[str, Any], Steps]:
    """Return the shapes of what is on the devices throughout an iteration, by name, and the stages."""
    plans = make_plans(config, sizes.transformer, sizes.vq, sizes.scheduler.shift, mesh)
    optimizer = optimizer_of(config)
    whole_model = transformer.abstract(sizes.transformer)
    learned = trained(config, whole_model, sizes.transformer)
    state = abstract_state(optimizer, learned, config.optimizer.ema_decay > 0, mesh)
    codes = (sizes.transformer.lm_head_size, sizes.vq.vq_embed_dim)
    whole = meshes.replicated(mesh)
    path = ProbabilityPath(_spread(codes, jnp.float32, whole), sizes.scheduler.alpha, sizes.scheduler.c)

    def copy(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: _spread(leaf.shape, plans.compute_dtype, sharding),
            tree,
            steps.copies(tree),
        )

    steps = build(config, plans, path, optimizer, mesh, state)
    reference = copy(whole_model)
    held = {
        "state": state,
        "policy": lora.attach(reference, copy(state.params)) if config.lora.rank else copy(whole_model),
        "reference": reference,
        "tokenizer": jax.tree.map(lambda leaf: _spread(leaf.shape, leaf.dtype, whole), vq.abstract(sizes.vq)),
        "path": path,
    }
    return held, steps


def _batches(config: RunConfig, sizes: Sizes, mesh: Mesh, steps: Steps) -> dict[str, Any]:
    """Return the shapes of the batches that the stages take."""
    over_batch, whole = meshes.over_batch(mesh), meshes.replicated(mesh)
    L, m, N = sizes.text_length, steps.sizes.rollout, steps.plans.network.tokens
    B, T, M = steps.sizes.drawn, config.rollout.steps, config.grpo.minibatches
    kept = steps.plans.rollout.keep_trajectory

    def whole_numbers(*shape: int) -> Any:
        return _spread(shape, jnp.int32, over_batch)

    return {
        "rollout prompts": whole_numbers(m, L),
        "rollout clean": whole_numbers(m, N),
        "empty": _spread((L,), jnp.int32, whole),
        "index": whole_numbers(m),
        "key": _spread((), jax.random.key(0).dtype, whole),
        "prompts": whole_numbers(B, L),
        "clean": whole_numbers(B, N),
        "trajectory": _spread((T, B, N), jnp.int32, meshes.over_second(mesh)) if kept else None,
        "score": _spread((config.rollout.prompts, config.rollout.group_size), jnp.float32, whole),
        "images": _spread((steps.sizes.images // M,), jnp.int32, whole) if M > 1 else None,
    }


def _samples(held: dict[str, Any], batches: dict[str, Any], steps: Steps, mesh: Mesh) -> Samples:
    """Return the shapes of the training states, which the objective of the run determines."""
    rolled = Rollout(batches["clean"], batches["trajectory"], batches["trajectory"])
    samples = jax.eval_shape(
        steps.prepare, held["policy"], held["reference"], batches["prompts"], rolled, batches["key"]
    )
    return jax.tree.map(lambda leaf: _spread(leaf.shape, leaf.dtype, meshes.over_batch(mesh)), samples)


def device_bytes(tree: Any) -> int:
    """Return the bytes on one device of shapes with shardings."""
    total = 0
    # A leaf that occurs twice is stored once: the base of an adapter is also the reference.
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values():
        shard = leaf.sharding.shard_shape(leaf.shape)
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        for length in shard:
            size *= length
        total += size
    return total

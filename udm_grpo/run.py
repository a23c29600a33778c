"""Puts a run together: checkpoint, mesh, compiled stages, prompt sets, scorer; and where it starts or goes on."""

import contextlib
import enum
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32, Key

from rewards_bridge.composition import Composition
from udm_grpo import mesh as meshes
from udm_grpo.batches import Params, TrainState
from udm_grpo.config import ConfigError, RunConfig, as_dict
from udm_grpo.diffusion.path import Path as NoisePath
from udm_grpo.diffusion.path import make_path
from udm_grpo.grpo.optimizer import adamw, learning_rate
from udm_grpo.host import rewards
from udm_grpo.host.checkpoint import Checkpoints, check_same_run, resolve_resume
from udm_grpo.host.checkpoint import restore as restore_checkpoint
from udm_grpo.host.metrics import write_json
from udm_grpo.host.prompts import PromptSet, read_prompts
from udm_grpo.host.weights import Checkpoint, load_folder
from udm_grpo.steps import Steps, build, make_plans

MOST_PROBLEMS = 50
"""Prompts that cannot be scored which an error spells out."""


class Stage(enum.IntEnum):
    """What a random key is for; a key is fold_in(fold_in(root, stage), step)."""

    ROLLOUT = 0
    STATES = 1
    EVALUATION = 2


@dataclass(frozen=True)
class Run:
    """Everything that does not change while a run goes on."""

    config: RunConfig
    mesh: Mesh
    checkpoint: Checkpoint
    """The start model as it lies on disk; its configs and tokenizer go into the export."""
    steps: Steps
    vq_params: Params
    train: PromptSet
    heldout: PromptSet
    client: Composition
    checkpoints: Checkpoints
    output: Path

    def key(self, stage: Stage, step: int) -> Key[Array, ""]:
        """The key of a stage at an iteration."""
        root = jax.random.fold_in(jax.random.key(self.config.seed), int(stage))
        return jax.random.fold_in(root, step)

    def prompt_ids(self, texts: Sequence[str]) -> Int32[Array, "b l"]:
        """Token ids of B prompts, spread over the devices."""
        return jax.device_put(self.checkpoint.tokenizer(texts), meshes.over_batch(self.mesh))

    def empty_ids(self) -> Int32[Array, " l"]:
        """Token ids of the empty prompt."""
        return jax.device_put(self.checkpoint.tokenizer.empty(), meshes.replicated(self.mesh))


@dataclass(frozen=True)
class Position:
    """Where a run stands; stored with every checkpoint."""

    step: int
    """Iterations done."""
    seconds: float
    """Wall-clock seconds spent in this run so far."""
    base: dict[str, Any]
    """Evaluations of the start model, by number of rollout steps."""
    best: float | None
    """Best held-out score on the way, if there was an evaluation."""


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The fields that must be the same when a run goes on: all that decide its numbers."""
    fields = as_dict(config)
    for name in ("output_dir", "checkpoint", "logging", "evaluation", "mesh"):
        fields.pop(name)
    if config.optimizer.schedule != "cosine":
        fields.pop("iterations")  # only the cosine schedule looks at the end
    fields["model"] = {name: fields["model"][name] for name in ("dtype", "text_length", "height", "width")}
    fields["rewards"] = {
        part: {name: given[name] for name in ("scorer", "weight", "options")}
        for part, given in fields["rewards"]["scorers"].items()
    }
    fields["rollout"].pop("micro_batch")
    fields["optimizer"].pop("micro_batch")
    return fields


def _prompts(field: str, file: str, weights: dict[str, float]) -> PromptSet:
    try:
        return read_prompts(file, weights or None)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def _check_prompts(client: Composition, field: str, given: PromptSet) -> None:
    """Ask the scorers about every prompt, so that no run ends at one that cannot be scored."""
    found = client.check(given.prompts, given.metadata)
    if not found:
        return
    lines = [f"prompt {index + 1} ({given.prompts[index]!r}): {text}" for index, text in found.items()]
    more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
    listed = "\n  ".join([f"{field}: {len(lines)} of {len(given)} prompts cannot be scored:", *lines[:MOST_PROBLEMS]])
    raise ConfigError("\n  ".join([listed, *more, "Mend or remove them, or choose another scorer."]))


def check_sizes(config: RunConfig, stride: int, mesh: Mesh) -> None:
    """Raise ConfigError or MeshError where the image or a batch does not fit the checkpoint or the mesh."""
    model = config.model
    if model.height % stride or model.width % stride:
        raise ConfigError(
            f"model.height x model.width is {model.height} x {model.width}, but a token of this checkpoint covers "
            f"{stride} x {stride} pixels; choose multiples of {stride}."
        )
    meshes.check_batch(
        mesh,
        {
            "rollout.micro_batch": config.rollout.micro_batch,
            "optimizer.micro_batch": config.optimizer.micro_batch,
            "evaluation.batch": config.evaluation.batch,
        },
    )


def abstract_state(optimizer: Any, params: Params, ema: bool, mesh: Mesh) -> TrainState:
    """The train state as shapes with shardings."""
    master = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, master)
    state = TrainState(params=master, opt_state=opt_state, ema=master if ema else None, step=step)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        meshes.shardings(mesh, state),
    )


def path_of(checkpoint: Checkpoint) -> NoisePath:
    """The probability path of a checkpoint."""
    scheduler = checkpoint.scheduler
    return make_path(checkpoint.path_codebook, scheduler.alpha, scheduler.c, scheduler.eps)


def optimizer_of(config: RunConfig) -> Any:
    """The optax transformation of a run."""
    given = config.optimizer
    rate = learning_rate(
        given.learning_rate,
        given.schedule,
        config.iterations * config.grpo.updates_per_rollout,
        given.warmup_updates,
        given.final_fraction,
        given.milestones,
        given.milestone_factor,
    )
    return adamw(rate, given.beta1, given.beta2, given.weight_decay, given.max_grad_norm)


def open_run(config: RunConfig, stack: contextlib.ExitStack) -> tuple[Run, TrainState]:
    """Load and check everything before the first rollout; `stack` closes it. Returns the run and its abstract state.

    Raises ConfigError, MeshError, and the errors of the files that the config names.
    """
    mesh = meshes.make_mesh(asdict(config.mesh))
    checkpoint = load_folder(config.model.path, prompt_length=config.model.text_length or None)
    check_sizes(config, checkpoint.vq_config.stride, mesh)
    train = _prompts("prompts.train", config.prompts.train, config.prompts.tag_weights)
    heldout = _prompts("prompts.heldout", config.prompts.heldout, {})
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", as_dict(config))
    plans = make_plans(
        config,
        checkpoint.transformer_config,
        checkpoint.vq_config,
        checkpoint.scheduler.shift,
        meshes.batch_shards(mesh),
    )
    optimizer = optimizer_of(config)
    abstract = abstract_state(optimizer, checkpoint.transformer, config.optimizer.ema_decay > 0, mesh)
    path = jax.device_put(path_of(checkpoint), meshes.replicated(mesh))
    client = stack.enter_context(rewards.connect(config.rewards, output / "kept_images"))
    _check_prompts(client, "prompts.train", train)
    _check_prompts(client, "prompts.heldout", heldout)
    run = Run(
        config=config,
        mesh=mesh,
        checkpoint=checkpoint,
        steps=build(config, plans, path, optimizer, mesh, abstract),
        vq_params=jax.device_put(checkpoint.vq, meshes.replicated(mesh)),
        train=train,
        heldout=heldout,
        client=client,
        checkpoints=Checkpoints(output / "checkpoints", config.checkpoint.keep),
        output=output,
    )
    return run, abstract


def start(run: Run, abstract: TrainState) -> tuple[TrainState, Params, Position | None]:
    """(state, reference parameters, position): of the checkpoint to go on from, or fresh with position None.

    The reference is part of every checkpoint, so that a resumed run keeps the model it started from whatever has
    become of the folder since.
    """
    reference = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, run.steps.plans.compute_dtype, sharding=leaf.sharding),
        abstract.params,
    )
    found = resolve_resume(run.config.checkpoint.resume, run.checkpoints.folder)
    if found is None:
        run.checkpoints.set_aside_after(-1)
        master = jax.tree.map(
            lambda leaf, like: jax.device_put(np.asarray(leaf, np.float32), like.sharding),
            run.checkpoint.transformer,
            abstract.params,
        )
        state = _fresh_state(run, abstract, master)
        return state, run.steps.compute_copy(master), None
    saved, meta = restore_checkpoint(found, {"state": abstract, "reference": reference})
    check_same_run(meta, fingerprint(run.config))
    position = Position(**meta["position"])
    run.checkpoints.set_aside_after(position.step)
    return saved["state"], saved["reference"], position


def _fresh_state(run: Run, abstract: TrainState, master: Params) -> TrainState:
    optimizer = optimizer_of(run.config)
    opt_state = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), optimizer.init(master), abstract.opt_state
    )
    return TrainState(
        params=master,
        opt_state=opt_state,
        ema=None if abstract.ema is None else jax.tree.map(jnp.copy, master),
        step=jax.device_put(jnp.int32(0), abstract.step.sharding),
    )


def save(run: Run, state: TrainState, reference: Params, position: Position) -> None:
    """Save everything an exact resume needs."""
    meta = {"fingerprint": fingerprint(run.config), "position": asdict(position)}
    run.checkpoints.save(position.step, {"state": state, "reference": reference}, meta)


def exported(checkpoint: Checkpoint, params: Params) -> Checkpoint:
    """The start model's folder with other transformer weights in it."""
    return replace(checkpoint, transformer=jax.tree.map(lambda leaf: np.asarray(jax.device_get(leaf)), params))

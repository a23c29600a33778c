"""Set up a run: model, mesh, compiled stages, prompt sets, scorers, and where it starts or resumes."""

import contextlib
import enum
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int32, Key

from rewards_bridge.composition import Composition
from rewards_bridge.redaction import redacted_values
from udm_grpo import mesh as meshes
from udm_grpo import shared_rewards
from udm_grpo.batches import Params, TrainState
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.checkpoints.checkpoint_fallback import restore_or_older
from udm_grpo.compiled import Steps, build, make_plans
from udm_grpo.config import ConfigError, RunConfig, as_dict
from udm_grpo.data.prompts import PromptSet, read_prompts
from udm_grpo.diffusion.path import ProbabilityPath, make_path
from udm_grpo.files.buckets import Mirror, local, local_prompts
from udm_grpo.files.set_aside import CONFIG
from udm_grpo.grpo.optimizer import adamw, learning_rate
from udm_grpo.lifecycle.disk_check import check_space
from udm_grpo.lifecycle.fingerprint import agreed, fingerprint
from udm_grpo.lifecycle.identity import Identity, check_continues, identify
from udm_grpo.lifecycle.interruption import Interruption
from udm_grpo.lifecycle.output_folder import (
    check_inputs_stay,
    check_output,
    checkpoints_place,
    claim_output,
    lock_for_run,
    output_path,
    set_aside_older,
)
from udm_grpo.model import lora, transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.multihost import hosts
from udm_grpo.released.weights import ReleasedModel, load_folder, load_transformer, transformer_path
from udm_grpo.reporting.metrics import write_json
from udm_grpo.scoring import rewards
from udm_grpo.scoring.evaluation_parts import remove_parts

MAX_PROBLEMS = 50
"""Maximum number of unscorable prompts that an error lists."""


class Stage(enum.IntEnum):
    """The use of a random key, which is fold_in(fold_in(root, stage), step)."""

    ROLLOUT = 0
    STATES = 1
    EVALUATION = 2
    ADAPTER = 3
    MINIBATCHES = 4


@dataclass(frozen=True)
class Run:
    """Everything that stays constant during a run."""

    config: RunConfig
    mesh: Mesh
    released: ReleasedModel
    """The start model as on disk, with only the shapes of its transformer; the rest is copied into the export."""
    steps: Steps
    vq_params: Params
    train: PromptSet
    heldout: PromptSet
    client: Composition
    checkpoints: Checkpoints
    output: Path
    """The run's folder; for a run in a bucket, the local staging folder."""
    identity: Identity
    """Its id and the checkpoint that it resumes from."""
    asked: Interruption
    """Whether it was asked to stop."""
    mirror: Mirror | None = None
    """Mirrors `output` to the bucket; only in process 0 of a run in a bucket."""

    def key(self, stage: Stage, step: int) -> Key[Array, ""]:
        """Return the key of a stage at an iteration."""
        root = jax.random.fold_in(jax.random.key(self.config.seed), int(stage))
        return jax.random.fold_in(root, step)

    def prompt_ids(self, texts: Sequence[str]) -> Int32[Array, "b l"]:
        """Return token ids of B prompts, spread over the devices; each host tokenizes its own rows."""

        def ids(rows: Sequence[int]) -> np.ndarray:
            return self.released.tokenizer([texts[row] for row in rows], warn=False)  # start_notes has warned

        return hosts.put_rows(ids, len(texts), meshes.over_batch(self.mesh))

    def empty_ids(self) -> Int32[Array, " l"]:
        """Return token ids of the empty prompt."""
        return hosts.put(self.released.tokenizer.empty(), meshes.replicated(self.mesh))


@dataclass(frozen=True)
class Position:
    """The progress of a run; stored with every checkpoint."""

    step: int
    """Completed iterations."""
    seconds: float
    """Wall-clock seconds spent in this run so far."""
    base: dict[str, Any]
    """Evaluations of the start model, by number of rollout steps."""
    best: float | None
    """Best held-out score during training, if there was an evaluation."""
    looked: bool = True
    """Whether the sample images and the evaluation that are due after this step are done."""


def _prompts(field: str, file: str, weights: dict[str, float], key: str) -> PromptSet:
    try:
        return read_prompts(local_prompts(file), weights or None, key)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{field}: {error}") from error


def _check_prompts(client: Composition, field: str, prompts: PromptSet) -> None:
    """Check every prompt with the scorers, so that no run fails later at one that cannot be scored."""
    problems = client.check(prompts.prompts, prompts.metadata)
    if not problems:
        return
    lines = [f"prompt {index + 1} ({prompts.prompts[index]!r}): {text}" for index, text in problems.items()]
    more = [f"and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    listed = "\n  ".join([f"{field}: {len(lines)} of {len(prompts)} prompts cannot be scored:", *lines[:MAX_PROBLEMS]])
    raise ConfigError("\n  ".join([listed, *more, "Correct or remove them, or choose another scorer."]))


def check_sizes(config: RunConfig, stride: int) -> None:
    """Raise ConfigError if the image size is not a multiple of the image tokenizer's stride."""
    model = config.model
    if model.height % stride or model.width % stride:
        raise ConfigError(
            f"model.height x model.width is {model.height} x {model.width}, but a token of this model covers "
            f"{stride} x {stride} pixels; choose multiples of {stride}."
        )


def abstract_state(optimizer: Any, params: Params, ema: bool, mesh: Mesh) -> TrainState:
    """Return the train state as shapes with shardings."""
    master = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, master)
    state = TrainState(params=master, opt_state=opt_state, ema=master if ema else None, step=step)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        meshes.shardings(mesh, state),
    )


def trained(config: RunConfig, whole: Params, sizes: TransformerConfig) -> Params:
    """Return the trained parameters: `whole`, or an abstract adapter of them.

    Raises ConfigError if the rank is too large.
    """
    settings = config.lora
    if not settings.rank:
        return whole
    try:
        return lora.abstract(sizes, settings.rank, lora.targets(settings.targets))
    except ValueError as error:
        raise ConfigError(f"lora.rank does not fit {config.model.path}: {error}.") from None


def path_of(released: ReleasedModel) -> ProbabilityPath:
    """Return the probability path of a released model."""
    scheduler = released.scheduler
    return make_path(released.path_codebook, scheduler.alpha, scheduler.c, scheduler.eps)


def optimizer_of(config: RunConfig) -> Any:
    """Return the optax transformation of a run."""
    settings = config.optimizer
    rate = learning_rate(
        settings.learning_rate,
        settings.schedule,
        config.iterations * config.grpo.optimizer_steps,
        settings.warmup_updates,
        settings.final_fraction,
        settings.milestones,
        settings.milestone_factor,
    )
    return adamw(rate, settings.beta1, settings.beta2, settings.weight_decay, settings.max_grad_norm)


Settle = Callable[[RunConfig, ReleasedModel, Mesh], RunConfig]
"""Returns a configuration in which nothing is left to the memory of the devices."""


def open_run(
    config: RunConfig, asked: Interruption, stack: contextlib.ExitStack, settle: Settle | None = None
) -> tuple[Run, TrainState]:
    """Load and check everything before the first rollout; return the run, which `stack` closes, and its abstract state.

    settle: called while the scorers load, once everything else is checked; without it, the defaults of `build` hold.
    Writes nothing; see `begin`. Raises ConfigError, MeshError, errors of the files that the config names, and
    StopRequestedError if the run is asked to stop before its scorers are loaded.
    """
    check_output(config)
    lock_for_run(config.output_dir, asked, stack)
    mesh = meshes.make_mesh(asdict(config.mesh))
    prompt_length = config.model.text_length or None
    trained_weights = config.model.transformer or None
    released = load_folder(local(config.model.path), "float32", prompt_length, False, trained_weights)
    check_sizes(config, released.vq_config.stride)
    plans = make_plans(config, released.transformer_config, released.vq_config, released.scheduler.shift, mesh)
    train = _prompts("prompts.train", config.prompts.train, config.prompts.tag_weights, config.prompts.prompt_key)
    heldout = _prompts("prompts.heldout", config.prompts.heldout, {}, config.prompts.prompt_key)
    optimizer = optimizer_of(config)
    learned = trained(config, released.transformer, released.transformer_config)
    abstract = abstract_state(optimizer, learned, config.optimizer.ema_decay > 0, mesh)
    check_space(config, abstract, released.transformer)
    checkpoints = Checkpoints(checkpoints_place(config), config.checkpoint.keep)
    identity = identify(config, checkpoints, agreed(fingerprint(config, released, train, heldout)))
    output = output_path(config)
    check_inputs_stay(config, output)
    replicated = meshes.replicated(mesh)
    path = jax.tree.map(lambda leaf: hosts.put(leaf, replicated), path_of(released))
    client = shared_rewards.connect(config.rewards, output / "kept_images", asked, stack)
    rewards.warn_of([client])
    _check_prompts(client, "prompts.train", train)
    _check_prompts(client, "prompts.heldout", heldout)
    client.try_out(train.prompts[0], train.metadata[0], config.model.height, config.model.width)
    stack.callback(checkpoints.finish)  # a save in progress is completed even if the run fails
    if settle:
        config = settle(config, released, mesh)
        plans = make_plans(config, released.transformer_config, released.vq_config, released.scheduler.shift, mesh)
    run = Run(
        config=config,
        mesh=mesh,
        released=released,
        steps=build(config, plans, path, optimizer, mesh, abstract),
        vq_params=jax.tree.map(lambda leaf: hosts.put(leaf, replicated), released.vq),
        train=train,
        heldout=heldout,
        client=client,
        checkpoints=checkpoints,
        output=output,
        identity=identity,
        asked=asked,
    )
    return run, abstract


def start(run: Run, abstract: TrainState) -> tuple[TrainState, Params, Position | None]:
    """Return (state, reference parameters, position) of the checkpoint to resume from, or fresh ones and position None.

    Writes nothing; see `begin`.

    The reference is part of every checkpoint, so that a resumed run keeps the model it started from even if the model
    folder has changed since. It is also the base of an adapter.
    """
    whole = transformer.abstract(run.released.transformer_config)
    reference = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, run.steps.plans.compute_dtype, sharding=sharding),
        whole,
        run.steps.copies(whole),
    )
    if run.identity.resume is None:
        return *_fresh(run, abstract, reference), None
    saved, meta = restore_or_older(
        run.identity.resume,
        {"state": abstract, "reference": reference},
        run.config.checkpoint.resume,
        lambda meta: check_continues(meta, run.identity.fingerprint),
    )
    return saved["state"], saved["reference"], Position(**meta["position"])


def begin(run: Run, position: Position | None, stack: contextlib.ExitStack) -> Run:
    """Take over the run's folder, once nothing can refuse the start any more: the first write into it.

    position: where the run resumes from; None for a fresh start. Files of an older run are set aside: all of them, or,
    if it is this run itself, those after the position. Raises ConfigError if the processes do not share the folder.
    """
    run = replace(run, mirror=claim_output(run.config, stack))
    own_step = position.step if position is not None and run.identity.here else None
    if own_step is not None:
        run.checkpoints.set_aside_after(own_step)
    hosts.from_primary(lambda: set_aside_older(run.config, run.output, own_step))
    if hosts.is_primary():
        if position is None:
            remove_parts(run.output)
        write_json(run.output / CONFIG, {"run": run.identity.id, **redacted_values(as_dict(run.config))})
    if run.mirror:
        run.mirror.push()
    return run


def _fresh(run: Run, abstract: TrainState, reference: Params) -> tuple[TrainState, Params]:
    """Return (the state before the first update, the frozen reference), from the start model's folder."""
    config = run.released.transformer_config
    folder = transformer_path(local(run.config.model.path), run.config.model.transformer)
    if not run.config.lora.rank:
        master = load_transformer(folder, config, shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
        reference = run.steps.compute_copy(master)
        return run.steps.begin(master), reference
    shardings = jax.tree.map(lambda leaf: leaf.sharding, reference)
    base = load_transformer(folder, config, run.config.model.dtype, shardings)
    drawn = lora.init(abstract.params, run.key(Stage.ADAPTER, 0))
    adapter = jax.tree.map(lambda leaf, like: hosts.put(leaf, like.sharding), drawn, abstract.params)
    return run.steps.begin(adapter), base


def save(run: Run, state: TrainState, reference: Params, position: Position) -> None:
    """Start saving everything that an exact resume needs; the run continues while it is written."""
    meta = run.identity.saved_with(position=asdict(position))
    with run.asked.held():
        if run.mirror:
            run.mirror.push()  # so that earlier files are in the bucket before the checkpoint counts
    run.checkpoints.begin(position.step, {"state": state, "reference": reference}, meta)


def exported(released: ReleasedModel, params: Params) -> ReleasedModel:
    """Return the start model with these transformer weights."""
    return replace(released, transformer=params)

"""Every knob of a run, as plain dataclasses; validated once, at the start."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """Which checkpoint, and how it is computed."""

    path: str = ""
    """Folder in the released URSA format; the start model and the frozen reference."""
    dtype: str = "float32"
    """Compute dtype: float32, or bfloat16 on float32 master weights."""
    text_length: int = 0
    """L, text tokens; 0: the tokenizer's own model_max_length, at most 320."""
    height: int = 32
    """Pixels."""
    width: int = 32
    """Pixels."""
    attention: str = "xla"
    """Attention kernel: xla, or cudnn (NVIDIA GPUs, bfloat16)."""
    remat: str = "none"
    """What the backward pass recomputes: none, dots (all but matrix products) or full."""
    logit_rows: int = 4
    """Images whose logits (N x V each) exist at a time, on all devices together."""


@dataclass
class PromptsConfig:
    """What is drawn, and what it is judged on."""

    train: str = ""
    """File of training prompts: GenEval-format .jsonl, or .txt with one prompt a line."""
    heldout: str = ""
    """File of evaluation prompts, of the same kinds."""
    tag_weights: dict[str, float] = field(default_factory=dict)
    """How often each GenEval tag is drawn; empty: every prompt equally often."""


@dataclass
class RolloutConfig:
    """How images are drawn for training."""

    prompts: int = 16
    """P, prompts of an iteration."""
    group_size: int = 8
    """G, images of a prompt."""
    steps: int = 10
    """T."""
    guidance_scale: float = 1.0
    """g; 1 is CFG-free, the method."""
    guidance_trunc: float = 0.9
    """Guidance acts while t_k is below this."""
    shift: float = 0.0
    """s of the schedule; 0: the checkpoint's."""
    micro_batch: int = 32
    """Images that are rolled out, decoded and sent to the scorer together."""


@dataclass
class GRPOConfig:
    """The method."""

    trained_steps: int = 3
    """K, consecutive steps that an update trains on."""
    window_starts: int = 3
    """The window's first step is drawn uniformly from [0, window_starts)."""
    trajectory: str = "forward"
    """forward (the method): the final image noised to t_k; rollout (ablation): x_k as the rollout met it."""
    action: str = "clean"
    """clean (the method): the final tokens; intermediate (ablation): the x_1 drawn at step k."""
    clip_range: float = 1e-4
    """eps, the clip of the ratio."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    global_std: bool = False
    """Divide by the std of all scores of an iteration instead of the group's."""
    kl_weight: float = 0.05
    """beta, the weight of the k3 KL to the start model."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same rollout; more than 1 stores old log-probabilities first."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-6
    """eta, after the warm-up."""
    schedule: str = "constant"
    """constant, cosine (to final_fraction at the last update) or multistep."""
    warmup_updates: int = 0
    """Updates over which the rate rises linearly from 0."""
    final_fraction: float = 0.0
    """cosine: the last rate as a fraction of eta."""
    milestones: tuple[int, ...] = ()
    """multistep: updates at which the rate is multiplied by milestone_factor."""
    milestone_factor: float = 0.1
    """multistep: see milestones."""
    beta1: float = 0.9
    """beta_1."""
    beta2: float = 0.95
    """beta_2."""
    weight_decay: float = 0.01
    """lambda."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    micro_batch: int = 32
    """Training states (of the K*B) whose gradients are taken together; the rest is accumulated."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights; 0: none is kept."""


@dataclass
class RewardsConfig:
    """The scorer and the process that holds it."""

    scorer: str = "shapes"
    """A known scorer, or module:Class."""
    options: dict[str, str] = field(default_factory=dict)
    """Handed to the scorer."""
    address: str = ""
    """Of a running server (unix:/path or host:port); empty: the trainer starts one."""
    interpreter: str = ""
    """Python that runs the scorer; empty: this one."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the scorer's process, e.g. CUDA_VISIBLE_DEVICES."""
    deadline_s: float = 300.0
    """Seconds a batch may take to score."""
    start_timeout_s: float = 300.0
    """Seconds the scorer may take to load."""
    max_restarts: int = 3
    """Times that a dead or hanging scorer is started again."""
    tls_ca: str = ""
    """Certificate (PEM) that a server on another machine is checked against."""
    token_file: str = ""
    """File with the token that such a server wants."""


@dataclass
class MeshConfig:
    """Sizes of the device mesh; -1: the rest of the devices."""

    data: int = -1
    """Devices that share the batch and hold the same weights."""
    fsdp: int = 1
    """Devices that share the batch and the weights."""
    tensor: int = 1
    """Devices that share a layer."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation; its images are drawn from the same noise each time."""

    every: int = 100
    """Iterations between evaluations; 0: only at the start and the end."""
    prompts: int = 64
    """Held-out prompts of an evaluation on the way, balanced over tags."""
    final_prompts: int = 553
    """Held-out prompts of the first and the last evaluation."""
    images_per_prompt: int = 4
    """Images of a prompt."""
    steps: tuple[int, ...] = (25,)
    """T of an evaluation; the first is the one that summary.json calls base and final."""
    batch: int = 32
    """Images that are rolled out together."""
    picture_every: int = 100
    """Iterations between sample pictures (the same prompts and noise each time); 0: none on the way."""
    picture_prompts: int = 16
    """Prompts of a sample picture."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 100
    """Iterations between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: str = "none"
    """latest (of output_dir; starts afresh when there is none), none, or the path of a checkpoint."""
    keep_best: bool = False
    """Also keep the weights with the best held-out score on the way, and export those."""


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl and the progress bar."""

    tensorboard: bool = False
    """Write TensorBoard files (tensorboardX)."""
    wandb: bool = False
    """Write to Weights & Biases (needs its own package)."""


@dataclass
class RunConfig:
    """One run."""

    output_dir: str = "outputs/run"
    """Where everything goes; made if missing."""
    seed: int = 0
    """Decides every random draw of the run."""
    iterations: int = 1000
    """Rollouts, each with its update(s)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what to change, one line a problem."""


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as nested dicts of plain values."""
    return dataclasses.asdict(config)


def _choice(problems: list[str], name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        problems.append(f"{name} is {value!r}; set it to one of {', '.join(allowed)}.")


def _at_least(problems: list[str], least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:  # NaN too
            problems.append(f"{name.replace('__', '.')} is {value}; set it to at least {least}.")


def _above_zero(problems: list[str], **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            problems.append(f"{name.replace('__', '.')} is {value}; set it above 0.")


def _choices(config: RunConfig, problems: list[str]) -> None:
    _choice(problems, "model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _choice(problems, "model.attention", config.model.attention, ("xla", "cudnn"))
    _choice(problems, "model.remat", config.model.remat, ("none", "dots", "full"))
    _choice(problems, "grpo.trajectory", config.grpo.trajectory, ("forward", "rollout"))
    _choice(problems, "grpo.action", config.grpo.action, ("clean", "intermediate"))
    _choice(problems, "optimizer.schedule", config.optimizer.schedule, ("constant", "cosine", "multistep"))


def _ranges(config: RunConfig, problems: list[str]) -> None:
    rollout, grpo, optimizer, evaluation = config.rollout, config.grpo, config.optimizer, config.evaluation
    rewards = config.rewards
    _at_least(problems, 1, iterations=config.iterations, rollout__prompts=rollout.prompts)
    _at_least(problems, 1, rollout__steps=rollout.steps, rollout__micro_batch=rollout.micro_batch)
    _at_least(problems, 2, rollout__group_size=rollout.group_size)
    _at_least(problems, 1, grpo__trained_steps=grpo.trained_steps, grpo__window_starts=grpo.window_starts)
    _at_least(problems, 1, grpo__updates_per_rollout=grpo.updates_per_rollout)
    _at_least(problems, 1, optimizer__micro_batch=optimizer.micro_batch, model__logit_rows=config.model.logit_rows)
    _at_least(problems, 1, evaluation__prompts=evaluation.prompts, evaluation__final_prompts=evaluation.final_prompts)
    _at_least(problems, 1, evaluation__images_per_prompt=evaluation.images_per_prompt)
    _at_least(problems, 1, evaluation__batch=evaluation.batch, evaluation__picture_prompts=evaluation.picture_prompts)
    _at_least(problems, 0, evaluation__every=evaluation.every, evaluation__picture_every=evaluation.picture_every)
    _at_least(problems, 0, checkpoint__every=config.checkpoint.every, model__text_length=config.model.text_length)
    _at_least(problems, 1, checkpoint__keep=config.checkpoint.keep)
    _at_least(problems, 0, grpo__kl_weight=grpo.kl_weight, grpo__clip_range=grpo.clip_range)
    _at_least(problems, 0, optimizer__learning_rate=optimizer.learning_rate, rollout__shift=rollout.shift)
    _at_least(problems, 0, optimizer__warmup_updates=optimizer.warmup_updates)
    _at_least(problems, 0, optimizer__weight_decay=optimizer.weight_decay)
    _at_least(problems, 1, rollout__guidance_scale=rollout.guidance_scale)
    _at_least(problems, 1, model__height=config.model.height, model__width=config.model.width)
    if not 0 <= optimizer.ema_decay < 1:
        problems.append(f"optimizer.ema_decay is {optimizer.ema_decay}; set it to 0 (off) or between 0 and 1.")
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= beta < 1:
            problems.append(f"optimizer.{name} is {beta}; set it to 0 or more and below 1.")
    _above_zero(problems, optimizer__max_grad_norm=optimizer.max_grad_norm, grpo__advantage_clip=grpo.advantage_clip)
    _above_zero(problems, rewards__deadline_s=rewards.deadline_s, rewards__start_timeout_s=rewards.start_timeout_s)
    _at_least(problems, 0, rewards__max_restarts=rewards.max_restarts)
    if not evaluation.steps:
        problems.append("evaluation.steps is empty; name at least one number of rollout steps.")
    elif min(evaluation.steps) < 1:
        problems.append(f"evaluation.steps is {evaluation.steps}; set it to numbers of at least 1.")


def _combinations(config: RunConfig, problems: list[str]) -> None:
    rollout, grpo = config.rollout, config.grpo
    images = rollout.prompts * rollout.group_size
    last = grpo.window_starts + grpo.trained_steps - 1
    if last > rollout.steps:
        problems.append(
            f"grpo.window_starts + grpo.trained_steps - 1 is {last}, past the rollout's {rollout.steps} steps; lower "
            "one of them or raise rollout.steps."
        )
    if rollout.micro_batch >= 1 and images % rollout.micro_batch:
        problems.append(
            f"rollout.prompts x rollout.group_size is {images}, which rollout.micro_batch {rollout.micro_batch} does "
            "not divide; change one of them."
        )
    if config.optimizer.micro_batch >= 1 and (images * grpo.trained_steps) % config.optimizer.micro_batch:
        problems.append(
            f"an update has prompts x group_size x trained_steps = {images * grpo.trained_steps} states, which "
            f"optimizer.micro_batch {config.optimizer.micro_batch} does not divide; change one of them."
        )
    if config.optimizer.schedule == "multistep" and not config.optimizer.milestones:
        problems.append("optimizer.schedule is multistep without optimizer.milestones; name at least one.")
    if config.optimizer.milestones and config.optimizer.schedule != "multistep":
        problems.append("optimizer.milestones acts only with optimizer.schedule=multistep; set that or drop them.")
    sizes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in sizes.values()) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        problems.append(f"mesh is {sizes}; every size is at least 1, and at most one is -1 (the rest of the devices).")
    for name, value in (("model.path", config.model.path), ("prompts.train", config.prompts.train)):
        if not value:
            problems.append(f"{name} is empty; name a {'folder' if name == 'model.path' else 'file'}.")
    if not config.prompts.heldout:
        problems.append("prompts.heldout is empty; name a file of evaluation prompts.")
    if config.checkpoint.keep_best and not config.evaluation.every:
        problems.append("checkpoint.keep_best needs evaluations on the way; set evaluation.every above 0.")


def validate(config: RunConfig) -> None:
    """Raise ConfigError listing every field or combination that cannot run."""
    problems: list[str] = []
    _choices(config, problems)
    _ranges(config, problems)
    _combinations(config, problems)
    if problems:
        raise ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))

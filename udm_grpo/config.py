"""All settings of a run, as plain dataclasses; config_checks.py validates them once, at the start."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rewards_bridge.errors import UserError


@dataclass
class ModelConfig:
    """The model to train, and how it is computed."""

    path: str = ""
    """Folder in the released URSA format; the start model and the frozen reference."""
    transformer: str = ""
    """Trained transformer weights to start from instead of those in path: a file, its folder, or a checkpoint-N folder
    of the public release (of checkpoints or ema_checkpoints); empty: those in path."""
    dtype: str = "float32"
    """Compute dtype: float32, or bfloat16 on float32 master weights."""
    text_length: int = 0
    """L, text tokens; 0: the tokenizer's own model_max_length, at most 320."""
    height: int = 32
    """Pixels."""
    width: int = 32
    """Pixels."""
    attention: str = "auto"
    """Attention kernel: xla (anywhere), cudnn (NVIDIA GPUs, bfloat16), splash (TPUs), or auto: the one of these that
    was written for the devices, else xla."""
    remat: str = "auto"
    """What the backward pass recomputes: none, dots (all but matrix products), full, or auto: as little as fits into
    the memory of a device, by the compiler; none where its memory is unknown, as on a CPU."""
    compute_weights: str = "auto"
    """Where policy and reference are in the compute dtype: replicated (all of both on every device, so that images are
    drawn without any exchange, and gradients are exchanged once), sharded (like the float32 weights, by mesh.fsdp), or
    auto: replicated if rollout and update fit into the memory of a device, by the compiler."""
    logit_rows: int = 4
    """Images whose logits (N x V each) are in memory at a time, on each device that shares the batch."""


@dataclass
class LoraConfig:
    """Train a low-rank adapter beside the frozen start model instead of all its weights."""

    rank: int = 0
    """r; 0: off."""
    alpha: float = 32.0
    """alpha; the adapter's output is multiplied by alpha / r."""
    targets: tuple[str, ...] = ("*_proj",)
    """Adapted linear maps of each layer: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj or patterns."""


@dataclass
class PromptsConfig:
    """Training and evaluation prompts."""

    train: str = ""
    """Training prompts: a folder of scripts.prepare_prompts with its split, as in data/geneval:train; or a raw file:
    .jsonl (GenEval's format, or objects with a prompt), .json (an array of these), .txt (a prompt per line) or .csv."""
    heldout: str = ""
    """Evaluation prompts, in the same formats."""
    prompt_key: str = "prompt"
    """Key of the text to generate images from, in the objects of both files; for example dense_prompt."""
    tag_weights: dict[str, float] = field(default_factory=dict)
    """Relative sampling frequency of each GenEval tag; empty: every prompt equally often."""


@dataclass
class RolloutConfig:
    """How images are generated for training."""

    prompts: int = 16
    """P, prompts per iteration."""
    group_size: int = 8
    """G, images per prompt."""
    steps: int = 10
    """T, rollout steps."""
    guidance_scale: float = 1.0
    """g, the scale of classifier-free guidance (CFG); 1: CFG-free, as in the method."""
    guidance_trunc: float = 0.9
    """Guidance is applied while t_k is below this."""
    shift: float = 0.0
    """s of the schedule; 0: the released model's."""
    micro_batch: int = 0
    """Images that are rolled out, decoded and sent to the scorer together, over all devices; batch_sizes.py adjusts it
    to the number of devices. 0: as many as fit, but at most a quarter of an iteration's, so that the first are scored
    while others are drawn; 32 where the memory of a device is unknown, as on a CPU."""


@dataclass
class GRPOConfig:
    """The UDM-GRPO method and its ablations."""

    objective: str = "udm_grpo"
    """udm_grpo, or module:Class for one of your own; udm_grpo/grpo/README.md shows how."""
    trained_steps: int = 3
    """K, consecutive steps that an update trains on."""
    window_starts: int = 3
    """The window's first step is drawn uniformly from [0, window_starts)."""
    trajectory: str = "forward"
    """forward (the method): the final image noised to t_k; rollout (ablation): x_k as it was in the rollout."""
    action: str = "clean"
    """clean (the method): the final tokens; intermediate (ablation): the x_1 drawn at step k."""
    clip_range: float = 1e-4
    """eps, the clip of the ratio."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    global_std: bool = False
    """Divide advantages by the standard deviation of all scores of an iteration instead of the group's."""
    kl_weight: float = 0.05
    """beta, the weight of the k3 KL to the start model."""
    skip_dead_groups: bool = False
    """Leave groups whose scores are all equal out of the update, which takes less time: their advantage is 0, and
    they contribute only to the KL term."""
    minibatches: int = 1
    """Disjoint parts of a rollout's images, one optimizer step each; together they are one pass over the rollout. Must
    divide prompts x group_size. The split is random and differs from pass to pass."""
    updates_per_rollout: int = 1
    """Passes over the same rollout, of `minibatches` optimizer steps each. With more than one step in
    total, the log-probabilities of the policy that generated the images are stored first, and the ratio and its clip
    take effect."""

    @property
    def optimizer_steps(self) -> int:
        """Return the number of optimizer steps per iteration."""
        return self.minibatches * self.updates_per_rollout


@dataclass
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-6
    """eta, after the warm-up."""
    schedule: str = "constant"
    """constant, cosine (to final_fraction at the last update) or multistep."""
    warmup_updates: int = 0
    """Updates over which the rate rises linearly from 0. Warm-up, schedule and average count only
    updates that were applied: one without any advantage (all groups dead) is skipped and does not count."""
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
    micro_batch: int = 0
    """Training states (of the K*B) in one gradient computation, over all devices; the gradients are accumulated. 0: as
    many as fit; 32 where the memory of a device is unknown, as on a CPU."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights; 0: none is kept."""
    ema_every: int = 1
    """Optimizer steps between updates of that average (the public release: a decay of 0.99 every 100 steps)."""


@dataclass
class ScorerConfig:
    """One scorer, its weight, and the processes that run it."""

    scorer: str = ""
    """A built-in scorer or module:Class; empty: the built-in scorer with the name of this entry."""
    weight: float = 1.0
    """Weight of this score in the total reward."""
    options: dict[str, str] = field(default_factory=dict)
    """Passed to the scorer."""
    replicas: int = 1
    """Processes to start; they share the images."""
    addresses: tuple[str, ...] = ()
    """Addresses of running servers that share the images (unix:/path or host:port); empty: the trainer starts its own.
    With addresses, replicas, devices, interpreter and environment are not used; options that differ from a server's
    cause a warning."""
    interpreter: str = ""
    """Python interpreter that runs the scorer; empty: the trainer's."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the scorer's processes."""
    devices: tuple[str, ...] = ()
    """GPUs of the scorer, as CUDA_VISIBLE_DEVICES names them (6,7): one process per GPU, which sees no other GPU, and
    the trainer sees none of them. auto: the last GPU if the trainer keeps another, else the CPU. cpu: the CPU. shared
    (the last GPU) or shared,6,7: GPUs that the trainer also uses. Empty: as the options and the environment say."""
    memory_fraction: float = 0.0
    """Fraction of a GPU's memory that one process of the scorer may use (in PyTorch); 0: with devices=shared an equal
    share of what rewards.trainer_memory_fraction leaves, else all."""
    deadline_s: float = 300.0
    """Seconds a batch may take to score."""
    start_timeout_s: float = 300.0
    """Seconds the scorer may take to load."""
    max_restarts: int = 3
    """Maximum restarts of a dead or hanging process, or reconnections to a lost server."""
    tls_ca: str = ""
    """Certificate (PEM) against which servers on other machines are verified."""
    token_file: str = ""
    """File with the token that such servers require."""
    check_example: bool = True
    """Stop the run if the scorer gets its built-in test images wrong; False: only warn."""


@dataclass
class RewardsConfig:
    """The reward: a weighted sum of scorers, each in its own processes."""

    scorers: dict[str, ScorerConfig] = field(default_factory=lambda: {"shapes": ScorerConfig()})
    """Scorers by name; every image is scored by all of them, concurrently."""
    trainer_memory_fraction: float = 0.0
    """Fraction of each of its GPUs' memory that the trainer reserves (XLA_PYTHON_CLIENT_MEM_FRACTION); 0: 0.85 if
    scorers have devices=shared, else JAX's default."""


@dataclass
class MeshConfig:
    """Sizes of the device mesh; -1: all remaining devices."""

    data: int = -1
    """Devices that split the batch and replicate the weights."""
    fsdp: int = 1
    """Devices that split the batch and the weights."""
    tensor: int = 1
    """Devices that split each layer."""


@dataclass
class DistributedConfig:
    """The processes of a run, one per host; process_place.py says where unset fields are read from."""

    coordinator: str = ""
    """host:port of process 0; empty: from the environment."""
    processes: int = 0
    """Number of processes; 0: from the environment."""
    process_id: int = -1
    """Id of this process, from 0; -1: from the environment."""
    initialization_timeout_s: float = 300.0
    """Seconds that the processes may take to connect."""
    silence_s: float = 60.0
    """Seconds without a heartbeat after which a process is considered lost and the others end."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation; its images are generated from the same noise each time."""

    every: int = 100
    """Iterations between evaluations; 0: only at the start and the end."""
    prompts: int = 64
    """Held-out prompts of an evaluation during training, balanced over tags."""
    final_prompts: int = 553
    """Held-out prompts of the first and the last evaluation."""
    images_per_prompt: int = 4
    """Images per prompt."""
    steps: tuple[int, ...] = (25,)
    """T of an evaluation; base and final in summary.json are those of the first."""
    guidance_scales: tuple[float, ...] = (1.0,)
    """g of an evaluation, with rollout.guidance_trunc; 1: CFG-free. The first and the last evaluation use all of them,
    everything else the first."""
    batch: int = 32
    """Images that are rolled out together, over all devices; rounded down to a multiple of the number of devices."""
    picture_every: int = 100
    """Iterations between sample pictures (the same prompts and noise each time); 0: none during training."""
    picture_prompts: int = 16
    """Prompts of a sample picture."""
    extremes: int = 6
    """How many of the best and of the worst images an evaluation keeps for the report; 0: none."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 100
    """Iterations between checkpoints; 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    resume: str = "none"
    """latest (of output_dir; starts from scratch if there is none), none, or the path of a checkpoint."""
    stopped_status: int = 0
    """Exit status of a run that SIGTERM has stopped; set it above 0 if the scheduler restarts only failed jobs."""
    keep_best: bool = False
    """Also keep the weights with the best held-out score during training, and export those."""


@dataclass
class LoggingConfig:
    """Where metrics go besides metrics.jsonl and the progress bar."""

    tensorboard: bool = False
    """Write TensorBoard files (tensorboardX)."""
    wandb: bool = False
    """Write to Weights & Biases (pip install wandb; the API key comes from WANDB_API_KEY or `wandb login`)."""
    wandb_project: str = "udm-grpo"
    """Project in Weights & Biases."""
    wandb_name: str = ""
    """Name of the run in Weights & Biases; empty: the last part of output_dir."""
    wandb_id: str = ""
    """Id of the run in Weights & Biases; empty: a new one, stored in output_dir, so that a resumed run continues it."""


@dataclass
class RunConfig:
    """The configuration of a run."""

    output_dir: str = "outputs/run"
    """Folder of all outputs; created if missing."""
    seed: int = 0
    """Seed of every random draw of the run."""
    iterations: int = 1000
    """Number of iterations, each a rollout with its update(s)."""
    compilation_cache: bool = True
    """Keep compiled programs in the folder `.compiled` beside output_dir, so that the next start is faster. Not for an
    output_dir in a bucket; JAX_COMPILATION_CACHE_DIR takes precedence."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


class ConfigError(UserError, ValueError):
    """A configuration that cannot run; the message says what to change, one line per problem."""


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Return the whole configuration as nested dicts of plain values."""
    return dataclasses.asdict(config)

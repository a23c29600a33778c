"""The only file that calls jit: pure stages in, compiled stages with shardings and donation out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, UInt8
from optax import GradientTransformation as Optimizer
from optax import OptState

from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import batch_sizes
from udm_grpo.batches import BatchSizes, Params, Rollout, Samples, TrainState
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.diffusion.pretrain import pretrain_loss
from udm_grpo.diffusion.rollout import RolloutPlan, rollout, sample_step
from udm_grpo.grpo.objective import Objective, objective_class
from udm_grpo.grpo.optimizer import step as optimizer_step
from udm_grpo.grpo.samples import of_step, prepare
from udm_grpo.grpo.update import EmaPlan, cast, update
from udm_grpo.model import lora
from udm_grpo.model.attention import choose
from udm_grpo.model.chunks import map_chunks, pad_rows
from udm_grpo.model.execution import Execution, TransformerConfig
from udm_grpo.model.network import Network
from udm_grpo.model.vq import codec as vq
from udm_grpo.model.vq.loss import tokenizer_loss, unit

CPU_TOKENS = 64
"""Tokens that a CPU device decodes at a time, or one image: four images of the shapes world."""
CPU_CHAINS = 4
"""Independent chains of such images in a program: more take less time to run, and more to compile."""
MULTITHREADED = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Compiler options with which all cores of a CPU compute a convolution, for training the tokenizer.

XLA (jax 0.10.2) passes convolutions to YNNPACK, which computes each on one core; limited to matrix products, it leaves
them to Eigen. Eigen's sums depend on the number of threads, so that pictures for scorers are not decoded like this.
"""
Metrics = dict[str, Float[Array, ""]]
RolloutStep = Callable[[Params, Array, Array, Array, Array], Rollout]


@dataclass(frozen=True)
class Plans:
    """Everything in a run's stages that is static under jit."""

    network: Network
    vq: vq.VQConfig
    rollout: RolloutPlan
    objective: Objective
    compute_dtype: Any


@dataclass(frozen=True)
class Steps:
    """The compiled stages of an iteration."""

    plans: Plans
    sizes: BatchSizes
    """Batch sizes of the stages: m is `rollout` or `evaluation`, B is `drawn`, S is `trained`."""
    rollout: RolloutStep
    """(compute params, prompt_ids i32[m,L], empty_ids i32[L], image_index i32[m], key) -> Rollout, in T steps."""
    rollout_in: Callable[[int, float], RolloutStep]
    """The same for another T and guidance scale, without trajectory, for evaluation."""
    decode: Callable[[Params, Array], UInt8[Array, "m hh ww 3"]]
    """(tokenizer params, ids i32[m,N]) -> images."""
    prepare: Callable[[Params, Params, Array, Rollout, Array], Samples]
    """(policy, reference, prompt_ids i32[B,L], rollout of B images, key) -> training states, advantages still 0."""
    update: Callable[..., tuple[TrainState, Metrics]]
    """One optimizer step: (state, policy, training states, score f32[P,G], images i32[B/M]) -> next state, metrics.

    The old state is donated; the policy is its compute copy. With minibatches, the step trains on the states of these
    images.
    """
    compute_copy: Callable[..., Params]
    """(master weights, reference) -> a copy in the compute dtype, placed as `copies` says; for an adapter, only the
    adapter is copied and the reference's own arrays are used."""
    copies: Callable[[Params], Params]
    """Parameters, possibly abstract -> the sharding of each in a compute copy, such as the reference."""
    begin: Callable[[Params], TrainState]
    """Master weights, or an adapter (donated) -> the state before the first update."""


def make_plans(
    config: RunConfig, transformer: TransformerConfig, vq_config: vq.VQConfig, shift: float, mesh: Mesh
) -> Plans:
    """Return the static plans of a run on `mesh`; `shift` is the released model's.

    Raises ConfigError for an attention kernel that the devices cannot run, and for an invalid objective.
    """
    settings = config.rollout
    grid = (config.model.height // vq_config.stride, config.model.width // vq_config.stride)
    shift = settings.shift or shift
    rows = config.model.logit_rows * meshes.batch_shards(mesh)
    remat = "none" if config.model.remat == "auto" else config.model.remat  # unless it is settled before
    execution = Execution(choose(config.model, mesh.devices.flat[0]).name, remat)
    objective = objective_class(config.grpo.objective).from_config(config, shift, rows)
    return Plans(
        network=Network(transformer, grid, execution, rows),
        vq=vq_config,
        rollout=RolloutPlan(
            settings.steps, shift, settings.guidance_scale, settings.guidance_trunc, objective.needs_rollout
        ),
        objective=objective,
        compute_dtype=jnp.dtype(config.model.dtype),
    )


def to_pixels(decoded: Float[Array, "b hh ww 3"]) -> UInt8[Array, "b hh ww 3"]:
    """Return decoded values, nominally in [-1, 1], as 8-bit images."""
    return jnp.round(jnp.clip((decoded + 1) / 2, 0, 1) * 255).astype(jnp.uint8)


def decoded(
    config: vq.VQConfig, params: Params, ids: Int32[Array, "b h w"], platform: str, shards: int = 1
) -> Float[Array, "b hh ww 3"]:
    """Return float32 pixels of codes on devices of a platform, over `shards` of which the batch is spread.

    On CPU each device decodes few images at a time, always the same number. A picture is then the same in any batch,
    since XLA's sums depend on the shapes of a program, and small pictures stay in the caches. XLA computes each
    convolution on one core (jax 0.10.2), so that small pictures are decoded in several chains, which run in parallel.
    """
    if platform != "cpu":
        return vq.decode(config, params, ids)
    batch, height, width = ids.shape
    images = max(1, CPU_TOKENS // (height * width))
    padded = pad_rows(ids, -(-batch // (shards * images)) * shards * images)
    chains = CPU_CHAINS if images > 1 else 1
    return map_chunks(lambda part: vq.decode(config, params, part), padded, shards * images, chains)[:batch]


def has_whole_copies(config: RunConfig, mesh: Mesh) -> bool:
    """Return whether every device has all of the weights in the compute dtype, also for "auto" on a mesh that can.

    Raises ConfigError for "replicated" on a mesh that splits layers.
    """
    if config.model.compute_weights == "replicated" and not meshes.can_replicate(mesh):
        raise ConfigError(
            f"model.compute_weights is replicated, but mesh.tensor splits each layer ({dict(mesh.shape)}); set "
            "model.compute_weights=auto or mesh.tensor=1."
        )
    return config.model.compute_weights != "sharded" and meshes.can_replicate(mesh)


def _placed(plans: Plans, mesh: Mesh, whole: bool) -> Plans:
    """Return the plans with the shardings of activations, blocks and head on `mesh`; `whole`: of whole copies."""
    execution = replace(
        plans.network.execution,
        batch=meshes.over_batch(mesh),
        head=None if whole else meshes.head(mesh),
        layers=None if whole else meshes.LayersTogether(mesh),
        shards=meshes.batch_shards(mesh),
        added_up=meshes.added_up(mesh) if whole else None,
    )
    return replace(plans, network=replace(plans.network, execution=execution))


def build(
    config: RunConfig, plans: Plans, path: ProbabilityPath, optimizer: Optimizer, mesh: Mesh, state: TrainState
) -> Steps:
    """Return the stages of a run on `mesh`, compiled on first use; `state`, possibly abstract, gives the shardings."""
    over_batch, replicated = meshes.over_batch(mesh), meshes.replicated(mesh)
    whole = has_whole_copies(config, mesh)
    plans = _placed(plans, mesh, whole)
    state_shardings = meshes.shardings(mesh, state)
    network, objective, sizes = plans.network, plans.objective, batch_sizes(config, mesh)
    factor = lora.factor(config.lora) if config.lora.rank else None
    copies = partial(meshes.compute_shardings, mesh, whole=whole)

    @cache  # repeated evaluations, and those with the rollout's own plan, are not compiled again
    def rollout_step(plan: RolloutPlan) -> RolloutStep:
        kept: Any = meshes.over_second(mesh) if plan.keep_trajectory else None
        first: Any = over_batch
        return free_rollout(network, path, plan, Rollout(first, kept, kept))

    def evaluation_step(steps: int, guidance_scale: float) -> RolloutStep:
        return rollout_step(RolloutPlan(steps, plans.rollout.shift, guidance_scale, plans.rollout.guidance_trunc))

    def decode(params: Params, ids: Int32[Array, "m n"]) -> UInt8[Array, "m hh ww 3"]:
        grids, platform = ids.reshape(-1, *network.grid), mesh.devices.flat[0].platform
        return to_pixels(decoded(plans.vq, params, grids, platform, network.execution.shards))

    def update_step(
        state: TrainState, policy: Params, samples: Samples, score: Array, images: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        return update(
            network,
            objective,
            optimizer,
            EmaPlan(config.optimizer.ema_decay, config.optimizer.ema_every),
            sizes.update,
            state,
            policy,
            of_step(objective, network, sizes, samples, score, images, config.grpo.skip_dead_groups),
            factor,
            config.grpo.skip_dead_groups,
        )

    def begin(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay > 0 else None
        return TrainState(params=params, opt_state=optimizer.init(params), ema=ema, step=jnp.int32(0))

    def prepare_step(path: ProbabilityPath, *args: Any) -> Samples:
        return prepare(objective, network, sizes, path, *args)

    return Steps(
        plans=plans,
        sizes=sizes,
        rollout=rollout_step(plans.rollout),
        rollout_in=evaluation_step,
        decode=jax.jit(decode, out_shardings=over_batch),
        prepare=partial(jax.jit(prepare_step, out_shardings=over_batch), path),
        update=jax.jit(update_step, out_shardings=(state_shardings, replicated), donate_argnums=0),
        compute_copy=_compute_copy(config, plans.compute_dtype, copies(state.params)),
        copies=copies,
        begin=jax.jit(begin, out_shardings=state_shardings, donate_argnums=0),
    )


@cache
def _is_known(*options: tuple[str, str]) -> bool:
    """Return whether this version of XLA has the compiler options."""
    try:
        jax.jit(jnp.negative, compiler_options=dict(options)).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _compute_copy(config: RunConfig, dtype: Any, out_shardings: Any) -> Callable[..., Params]:
    if not config.lora.rank:
        whole = jax.jit(partial(cast, dtype=dtype), out_shardings=out_shardings)
        return lambda params, reference=None: whole(params)
    factor = lora.factor(config.lora)
    adapter = jax.jit(lambda params: cast(lora.scaled(params, factor), dtype), out_shardings=out_shardings)
    # Outside jit, which would copy the reference.
    return lambda params, reference: lora.attach(reference, adapter(params))


def tokenizer_step(
    config: vq.VQConfig, optimizer: Optimizer, quantized: bool
) -> Callable[[Params, OptState, Array], tuple[Params, OptState, Metrics]]:
    """Return a training step of the image tokenizer: (params, opt_state, pixels f32[B,H,W,3]) -> the next, and metrics.

    The rows of the codebook are normalised to length 1 after each step.
    """

    def step(params: Params, opt_state: OptState, pixels: Array) -> tuple[Params, OptState, Metrics]:
        gradients, metrics = jax.grad(lambda p: tokenizer_loss(config, p, pixels, quantized), has_aux=True)(params)
        params, opt_state, metrics["grad_norm"] = optimizer_step(optimizer, gradients, opt_state, params)
        params["codebook"] = {"embedding": unit(params["codebook"]["embedding"])}
        return params, opt_state, metrics

    multithreaded = jax.default_backend() == "cpu" and _is_known(*MULTITHREADED.items())
    return jax.jit(step, donate_argnums=(0, 1), compiler_options=MULTITHREADED if multithreaded else None)


def tokenizer_latents(config: vq.VQConfig) -> Callable[[Params, Array], Array]:
    """Return pixels f32[B,H,W,3] -> unit-length latents f32[B,h,w,e], which initialize the tokenizer's codebook."""
    return jax.jit(lambda params, pixels: unit(vq.encode_latent(config, params, pixels)))


def tokenizer_codec(
    config: vq.VQConfig, shards: int = 1
) -> tuple[Callable[[Params, Array], Array], Callable[[Params, Array], Array]]:
    """Return (encode: pixels f32[B,H,W,3] -> ids i32[B,h,w], decode: ids -> pixels f32[B,H,W,3]).

    shards: devices over which a batch is spread.
    """
    encode = jax.jit(lambda params, pixels: vq.encode(config, params, pixels))
    decode = jax.jit(lambda params, ids: decoded(config, params, ids, jax.default_backend(), shards))
    return encode, decode


def image_logits(network: Network) -> Callable[[Params, Array, Array], Float[Array, "b n v"]]:
    """Return (params, prompt_ids i32[B,L], image_ids i32[B,N]) -> logits f32[B,N,V]."""
    return jax.jit(lambda params, *ids: network.logits(params, network.features(params, *ids)))


def features(network: Network) -> Callable[[Params, Array, Array], Float[Array, "b n d"]]:
    """Return (params, prompt_ids i32[B,L], image_ids i32[B,N]) -> features [B,N,D], a forward pass without the head."""
    return jax.jit(network.features)


def sampler() -> Callable[..., tuple[Int32[Array, " r"], Int32[Array, " r"]]]:
    """Return `sample_step` compiled: (path, logits f32[R,V], codes i32[R], times, uniform numbers f32[R,5])."""
    return jax.jit(sample_step)


def free_rollout(network: Network, path: ProbabilityPath, plan: RolloutPlan, out_shardings: Any = None) -> RolloutStep:
    """Return a rollout that needs no run, for notebooks and sampling."""

    def step(path: ProbabilityPath, *args: Any) -> Rollout:
        return rollout(network, path, plan, *args)

    # The path is an argument: in a closure, its codebook would be a constant of 134 MB in every program.
    return partial(jax.jit(step, out_shardings=out_shardings), path)


def pretrain_step(
    network: Network, path: ProbabilityPath, shift: float, optimizer: Optimizer
) -> Callable[..., tuple[Params, OptState, Metrics]]:
    """Return a pre-training step: (params, opt_state, prompt_ids i32[B,L], empty_ids i32[L], clean i32[B,N], key)."""

    def step(
        params: Params, opt_state: OptState, prompt_ids: Array, empty_ids: Array, clean: Array, key: Array
    ) -> tuple[Params, OptState, Metrics]:
        loss, gradients = jax.value_and_grad(
            lambda p: pretrain_loss(network, path, shift, p, prompt_ids, empty_ids, clean, key)
        )(params)
        params, opt_state, norm = optimizer_step(optimizer, gradients, opt_state, params)
        return params, opt_state, {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=(0, 1))

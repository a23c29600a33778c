"""The one place that jits: pure stages in, compiled stages with shardings and donation out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Key, UInt8
from optax import GradientTransformation as Optimizer
from optax import OptState

from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import BatchSizes, batch_sizes
from udm_grpo.batches import Params, Rollout, Samples, TrainState
from udm_grpo.config import GRPOConfig, RunConfig
from udm_grpo.diffusion.path import ProbabilityPath
from udm_grpo.diffusion.pretrain import pretrain_loss
from udm_grpo.diffusion.rollout import RolloutPlan, rollout
from udm_grpo.grpo.advantages import advantages
from udm_grpo.grpo.loss import LossPlan, token_mean_logps
from udm_grpo.grpo.minibatches import of_images
from udm_grpo.grpo.optimizer import step as optimizer_step
from udm_grpo.grpo.trajectory import TrajectoryPlan, trajectory
from udm_grpo.grpo.update import EmaPlan, cast, update
from udm_grpo.model import lora, vq
from udm_grpo.model.attention import choose
from udm_grpo.model.chunks import map_chunks, pad_rows
from udm_grpo.model.transformer import Execution, TransformerConfig, head, hidden_states, image_rows
from udm_grpo.model.vq_loss import tokenizer_loss, unit

Metrics = dict[str, Float[Array, ""]]
RolloutStep = Callable[[Params, Array, Array, Array, Array], Rollout]


@dataclass(frozen=True)
class Plans:
    """Everything about a run's stages that is static under jit."""

    transformer: TransformerConfig
    vq: vq.VQConfig
    execution: Execution
    rollout: RolloutPlan
    trajectory: TrajectoryPlan
    loss: LossPlan
    compute_dtype: Any


@dataclass(frozen=True)
class Steps:
    """The compiled stages of an iteration."""

    plans: Plans
    sizes: BatchSizes
    """The batches that the stages take: m images are `rollout` or `evaluation`, B are `drawn`, S are `trained`."""
    rollout: RolloutStep
    """(compute params, prompt_ids i32[m,L], empty_ids i32[L], image_index i32[m], key) -> Rollout, in T steps."""
    rollout_in: Callable[[int], RolloutStep]
    """The same for another T, without guidance or trajectory: for evaluation."""
    decode: Callable[[Params, Array], UInt8[Array, "m hh ww 3"]]
    """(tokenizer params, ids i32[m,N]) -> pictures."""
    prepare: Callable[[Params, Params, Array, Rollout, Array], Samples]
    """(policy, reference, prompt_ids i32[B,L], rollout of B images, key) -> training states, advantages still 0."""
    update: Callable[..., tuple[TrainState, Metrics]]
    """One optimizer step: (state, training states, score f32[P,G], reference, images i32[B/M]) -> next state, metrics.

    The old state is donated. The reference is the base of an adapter and used for nothing else. With minibatches, the
    step trains on the states of these images.
    """
    compute_copy: Callable[..., Params]
    """(master weights, reference) -> one copy in the compute dtype; of an adapter, which then has the reference's own
    arrays beside it."""
    begin: Callable[[Params], TrainState]
    """Master weights, or an adapter (donated) -> the state before the first update."""


def make_plans(
    config: RunConfig, transformer: TransformerConfig, vq_config: vq.VQConfig, shift: float, mesh: Mesh
) -> Plans:
    """Return the static plans of a run on `mesh`; `shift` is the checkpoint's.

    Raises ConfigError for an attention kernel that the devices cannot run.
    """
    grid = (config.model.height // vq_config.stride, config.model.width // vq_config.stride)
    shift = config.rollout.shift or shift
    rows = config.model.logit_rows * meshes.batch_shards(mesh)
    grpo = config.grpo
    return Plans(
        transformer=transformer,
        vq=vq_config,
        execution=Execution(choose(config.model, mesh.devices.flat[0]).name, config.model.remat),
        rollout=RolloutPlan(
            grid=grid,
            steps=config.rollout.steps,
            shift=shift,
            guidance_scale=config.rollout.guidance_scale,
            guidance_trunc=config.rollout.guidance_trunc,
            rows=rows,
            keep_trajectory=grpo.trajectory == "rollout" or grpo.action == "intermediate",
        ),
        trajectory=TrajectoryPlan(
            steps=config.rollout.steps,
            shift=shift,
            trained_steps=grpo.trained_steps,
            window_starts=grpo.window_starts,
            trajectory=grpo.trajectory,
            action=grpo.action,
            rows=rows,
        ),
        loss=LossPlan(grid=grid, clip_range=grpo.clip_range, kl_weight=grpo.kl_weight, rows=rows),
        compute_dtype=jnp.dtype(config.model.dtype),
    )


def to_pixels(decoded: Float[Array, "b hh ww 3"]) -> UInt8[Array, "b hh ww 3"]:
    """Return decoded values, nominally in [-1, 1], as 8-bit pictures."""
    return jnp.round(jnp.clip((decoded + 1) / 2, 0, 1) * 255).astype(jnp.uint8)


def logps_in_chunks(
    plans: Plans, params: Params, prompts: Array, noisy: Array, action: Array, micro_batch: int
) -> Float[Array, " s"]:
    """Token-mean log-probabilities of S states without gradients, `micro_batch` at a time."""

    def one(work: dict[str, Array]) -> Float[Array, " m"]:
        return token_mean_logps(
            plans.transformer, plans.execution, plans.loss, params, work["prompts"], work["noisy"], work["action"]
        )[0]

    return map_chunks(one, {"prompts": prompts, "noisy": noisy, "action": action}, micro_batch)


def prepare_samples(
    plans: Plans,
    path: ProbabilityPath,
    sizes: BatchSizes,
    with_old: bool,
    policy: Params,
    reference: Params,
    prompt_ids: Int32[Array, "b l"],
    rolled: Rollout,
    key: Key[Array, ""],
) -> Samples:
    """Training states of a rollout with their log-probabilities: all that an update needs but the scores.

    Images past the B of an iteration have no states; states past their S are copies of the last one, of weight 0.
    """
    B, S = sizes.images, sizes.trained
    image_index = jnp.arange(prompt_ids.shape[0], dtype=jnp.int32)
    states = trajectory(path, plans.trajectory, rolled, image_index, key)
    K = states.noisy.shape[0]
    noisy, action = states.noisy, states.action
    if prompt_ids.shape[0] > B:
        prompt_ids, noisy, action = prompt_ids[:B], noisy[:, :B], action[:, :B]
    noisy, action = (array.reshape(K * B, -1) for array in (noisy, action))
    prompts = jnp.tile(prompt_ids, (K, 1))
    weight = None
    if sizes.states < S:
        prompts, noisy, action = (plans.execution.spread(array) for array in pad_rows((prompts, noisy, action), S))
        weight = (jnp.arange(S) < sizes.states).astype(jnp.float32)
    ref_logp = logps_in_chunks(plans, reference, prompts, noisy, action, sizes.update)
    old_logp = logps_in_chunks(plans, policy, prompts, noisy, action, sizes.update) if with_old else None
    return Samples(
        prompt_ids=prompts,
        noisy=noisy,
        action=action,
        advantage=jnp.zeros(S),
        ref_logp=ref_logp,
        old_logp=old_logp,
        weight=weight,
    )


def with_advantages(
    samples: Samples, score: Float[Array, "p g"], sizes: BatchSizes, clip: float, global_std: bool
) -> Samples:
    """Return the training states with each image's advantage, repeated over the K steps."""
    advantage = advantages(score, clip, global_std).reshape(-1)
    repeated = jnp.tile(advantage, sizes.states // sizes.images)
    return replace(samples, advantage=pad_rows(repeated, sizes.trained))


def step_samples(
    plans: Plans, sizes: BatchSizes, grpo: GRPOConfig, samples: Samples, score: Array, images: Array | None
) -> Samples:
    """Return the training states of one optimizer step with their advantages, of all images or of `images` i32[B/M]."""
    samples = with_advantages(samples, score, sizes, grpo.advantage_clip, grpo.global_std)
    if images is None:
        return samples
    part = of_images(samples, images, sizes.images, sizes.states, sizes.stepped)
    return jax.tree.map(plans.execution.spread, part)


def _placed(plans: Plans, mesh: Mesh) -> Plans:
    """Return the plans with the shardings of activations, blocks and head on `mesh`."""
    execution = replace(
        plans.execution,
        batch=meshes.over_batch(mesh),
        head=meshes.head(mesh),
        layers=meshes.LayersTogether(mesh),
        shards=meshes.batch_shards(mesh),
    )
    return replace(plans, execution=execution)


def build(
    config: RunConfig, plans: Plans, path: ProbabilityPath, optimizer: Optimizer, mesh: Mesh, state: TrainState
) -> Steps:
    """Compile-on-first-use stages of a run on `mesh`; `state` may be abstract and gives the shardings."""
    over_batch, replicated = meshes.over_batch(mesh), meshes.replicated(mesh)
    plans = _placed(plans, mesh)
    state_shardings = meshes.shardings(mesh, state)
    grpo, sizes = config.grpo, batch_sizes(config, mesh)
    factor = lora.factor(config.lora) if config.lora.rank else 1.0

    @cache  # a second evaluation with these steps compiles nothing, nor one whose plan is the rollout's own
    def rollout_step(plan: RolloutPlan) -> RolloutStep:
        kept: Any = meshes.over_second(mesh) if plan.keep_trajectory else None
        first: Any = over_batch
        return free_rollout(plans.transformer, plans.execution, path, plan, Rollout(first, kept, kept))

    def evaluation_step(steps: int) -> RolloutStep:
        kept = plans.rollout
        return rollout_step(RolloutPlan(grid=kept.grid, steps=steps, shift=kept.shift, rows=kept.rows))

    def decode(params: Params, ids: Int32[Array, "m n"]) -> UInt8[Array, "m hh ww 3"]:
        return to_pixels(vq.decode(plans.vq, params, ids.reshape(-1, *plans.rollout.grid)))

    def update_step(
        state: TrainState, samples: Samples, score: Array, reference: Params | None = None, images: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        return update(
            plans.transformer,
            plans.execution,
            plans.loss,
            optimizer,
            EmaPlan(config.optimizer.ema_decay, config.optimizer.ema_every),
            plans.compute_dtype,
            sizes.update,
            state,
            step_samples(plans, sizes, grpo, samples, score, images),
            reference if config.lora.rank else None,
            factor,
        )

    def begin(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay > 0 else None
        return TrainState(params=params, opt_state=optimizer.init(params), ema=ema, step=jnp.int32(0))

    def prepare(path: ProbabilityPath, *given: Any) -> Samples:
        return prepare_samples(plans, path, sizes, grpo.optimizer_steps > 1, *given)

    return Steps(
        plans=plans,
        sizes=sizes,
        rollout=rollout_step(plans.rollout),
        rollout_in=evaluation_step,
        decode=jax.jit(decode, out_shardings=over_batch),
        prepare=partial(jax.jit(prepare, out_shardings=over_batch), path),
        update=jax.jit(update_step, out_shardings=(state_shardings, replicated), donate_argnums=0),
        compute_copy=_compute_copy(config, plans.compute_dtype, state_shardings.params),
        begin=jax.jit(begin, out_shardings=state_shardings, donate_argnums=0),
    )


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
    """One training step of the image tokenizer: (params, opt_state, pixels f32[B,H,W,3]) -> the next, and metrics.

    The codebook is brought back to rows of length 1 after each step.
    """

    def step(params: Params, opt_state: OptState, pixels: Array) -> tuple[Params, OptState, Metrics]:
        gradients, metrics = jax.grad(lambda p: tokenizer_loss(config, p, pixels, quantized), has_aux=True)(params)
        params, opt_state, metrics["grad_norm"] = optimizer_step(optimizer, gradients, opt_state, params)
        params["codebook"] = {"embedding": unit(params["codebook"]["embedding"])}
        return params, opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def tokenizer_latents(config: vq.VQConfig) -> Callable[[Params, Array], Array]:
    """Pixels f32[B,H,W,3] -> latents of length 1, f32[B,h,w,e]: what the tokenizer's codebook is set from."""
    return jax.jit(lambda params, pixels: unit(vq.encode_latent(config, params, pixels)))


def tokenizer_codec(config: vq.VQConfig) -> tuple[Callable[[Params, Array], Array], Callable[[Params, Array], Array]]:
    """(encode: pixels f32[B,H,W,3] -> ids i32[B,h,w], decode: ids -> pixels f32[B,H,W,3]), compiled per shape."""
    encode = jax.jit(lambda params, pixels: vq.encode(config, params, pixels))
    decode = jax.jit(lambda params, ids: vq.decode(config, params, ids))
    return encode, decode


def image_logits(
    config: TransformerConfig, execution: Execution, grid: tuple[int, int]
) -> Callable[[Params, Array, Array], Float[Array, "b n v"]]:
    """(params, prompt_ids i32[B,L], image_ids i32[B,N]) -> logits f32[B,N,V], compiled per shape."""

    def logits(params: Params, prompt_ids: Array, image_ids: Array) -> Float[Array, "b n v"]:
        hidden = hidden_states(config, params, prompt_ids, image_ids, grid, execution)
        return head(params, image_rows(hidden, image_ids.shape[1]))

    return jax.jit(logits)


def free_rollout(
    config: TransformerConfig, execution: Execution, path: ProbabilityPath, plan: RolloutPlan, out_shardings: Any = None
) -> RolloutStep:
    """Return a rollout outside a run: for notebooks and sampling."""

    def step(path: ProbabilityPath, *given: Any) -> Rollout:
        return rollout(config, execution, path, plan, *given)

    # The path is an argument: closed over, its codebook would be a constant of 134 MB in every program.
    return partial(jax.jit(step, out_shardings=out_shardings), path)


def pretrain_step(
    config: TransformerConfig,
    execution: Execution,
    path: ProbabilityPath,
    shift: float,
    grid: tuple[int, int],
    optimizer: Optimizer,
) -> Callable[..., tuple[Params, OptState, Metrics]]:
    """One pre-training step: (params, opt_state, prompt_ids i32[B,L], empty_ids i32[L], clean i32[B,N], key)."""

    def step(
        params: Params, opt_state: OptState, prompt_ids: Array, empty_ids: Array, clean: Array, key: Array
    ) -> tuple[Params, OptState, Metrics]:
        loss, gradients = jax.value_and_grad(
            lambda p: pretrain_loss(config, execution, path, shift, p, prompt_ids, empty_ids, clean, grid, key)
        )(params)
        params, opt_state, norm = optimizer_step(optimizer, gradients, opt_state, params)
        return params, opt_state, {"loss": loss, "grad_norm": norm}

    return jax.jit(step, donate_argnums=(0, 1))

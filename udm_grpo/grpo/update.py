"""One optimizer step from accumulated gradients."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from udm_grpo.batches import Params, Samples, TrainState
from udm_grpo.grpo.objective import Objective
from udm_grpo.grpo.optimizer import largest, unless
from udm_grpo.grpo.optimizer import step as optimizer_step
from udm_grpo.model import lora
from udm_grpo.model.chunks import chunk_size, split
from udm_grpo.model.network import Network


def cast(params: Params, dtype: Any) -> Params:
    """Return the parameters in the dtype used for computation."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def accumulated_gradients(
    network: Network,
    objective: Objective,
    params: Params,
    samples: Samples,
    micro_batch: int,
    base: Params | None = None,
    skip_empty: bool = False,
) -> tuple[Params, dict[str, Float[Array, ""]]]:
    """Return (float32 gradients, metrics), averaged over S samples that are processed `micro_batch` at a time.

    With weights, the average is over the samples whose weight is 1; with `skip_empty`, chunks without any are not
    computed. With `base`, which stays frozen, `params` is an adapter of it. If every device has the whole weights, each
    adds up the gradients of its own samples in float32, and they are exchanged once: they come back split over the
    devices as the master weights are.
    """
    size = chunk_size(samples.noisy.shape[0], micro_batch)
    execution = network.execution
    if execution.added_up is None:
        parts = 1
        sums = _sums(network, objective, params, samples, size, base, skip_empty)
    else:
        parts = execution.shards
        own = replace(network, execution=execution.on_one_device(), rows=max(network.rows // parts, 1))

        def of_device(weights: tuple[Params, Params | None], samples: Samples) -> Any:
            return _sums(own, objective, weights[0], samples, size // parts, weights[1], skip_empty)

        sums = execution.added_up(of_device, params)((params, base), samples)
    # A chunk's mean counts its padding as zeros, so divide by the number of full chunks that the weights amount to.
    count = samples.noisy.shape[0] // size if samples.weight is None else jnp.sum(samples.weight) / size
    return jax.tree.map(lambda total: total / (parts * count), sums)


def _sums(
    network: Network,
    objective: Objective,
    params: Params,
    samples: Samples,
    size: int,
    base: Params | None,
    skip_empty: bool,
) -> tuple[Params, dict[str, Array]]:
    """Return the gradients and metrics of chunks of `size` samples, added up over the chunks."""

    def loss(weights: Params, part: Samples) -> tuple[Array, dict[str, Array]]:
        whole = weights if base is None else lora.attach(base, weights)
        return objective.loss(network, whole, part)

    gradient = jax.value_and_grad(loss, has_aux=True)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)

    def add(carry: Params, part: Samples) -> tuple[Params, dict[str, Array]]:
        (_, metrics), gradients = gradient(params, part)
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), carry, gradients), metrics

    def add_weighted(carry: Params, part: Samples) -> tuple[Params, dict[str, Array]]:
        _, like = jax.eval_shape(add, carry, part)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return jax.lax.cond(jnp.any(jnp.asarray(part.weight) > 0), lambda: add(carry, part), lambda: (carry, nothing))

    gradients, metrics = jax.lax.scan(add_weighted if skip_empty else add, zeros, split(samples, size))
    return gradients, jax.tree.map(partial(jnp.sum, axis=0), metrics)


@dataclass(frozen=True)
class EmaPlan:
    """Settings of the moving average of the weights; static under jit."""

    decay: float = 0.0
    every: int = 1
    """Optimizer steps between updates of the average."""


def moved_average(plan: EmaPlan, ema: Params, params: Params, step: Int32[Array, ""]) -> Params:
    """Return the average after optimizer step `step` (counted from 1): decay * ema + (1 - decay) * params when due."""

    def moved(slow: Params, fast: Params) -> Params:
        return jax.tree.map(lambda s, f: plan.decay * s + (1 - plan.decay) * f, slow, fast)

    if plan.every == 1:
        return moved(ema, params)
    return jax.lax.cond(step % plan.every == 0, moved, lambda slow, _: slow, ema, params)


def has_signal(samples: Samples) -> Bool[Array, ""]:
    """Return whether any advantage is not 0; otherwise only the KL term and rounding would change the weights."""
    weight = jnp.float32(1) if samples.weight is None else samples.weight
    return jnp.any(jnp.where(weight > 0, samples.advantage, 0.0) != 0)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    average: EmaPlan,
    state: TrainState,
    gradients: Params,
    signal: Bool[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Return (next state, metrics) of one optimizer step on the master weights and, when due, on their average.

    Without `signal`, or if the gradients' norm is not finite, the step is skipped: the state stays the same bit for
    bit, including the counts for the schedule, Adam's bias correction and the average. Metrics: `grad_norm`, before
    clipping; `skipped`, 1 for a skipped step; `weight_max`, the largest absolute weight afterwards.
    """
    params, opt_state, norm = optimizer_step(optimizer, gradients, state.opt_state, state.params, ~signal)
    skipped = ~signal | ~jnp.isfinite(norm)
    step = state.step + 1
    ema = None if state.ema is None else unless(skipped, moved_average(average, state.ema, params, step), state.ema)
    after = TrainState(params=params, opt_state=opt_state, ema=ema, step=jnp.where(skipped, state.step, step))
    return after, {"grad_norm": norm, "skipped": skipped.astype(jnp.float32), "weight_max": largest(params)}


def update(
    network: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    average: EmaPlan,
    micro_batch: int,
    state: TrainState,
    policy: Params,
    samples: Samples,
    factor: float | None = None,
    skip_empty: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Return (next state, metrics): gradients of `policy`, the compute copy of the state, the step on float32 masters.

    `optimizer` clips the gradients itself. A step without any advantage (all groups dead) or with a gradient norm that
    is not finite is skipped; see `apply_gradients`. With `factor`, the state is that of an adapter, which the policy
    has scaled by `factor` and attached to frozen weights. With `skip_empty`, micro-batches whose weights are all 0 are
    not computed.

    Source: UDM-GRPO, arXiv 2604.18518.
    """
    learned, base = (policy, None) if factor is None else (lora.detach(policy, state.params), policy)
    gradients, metrics = accumulated_gradients(network, objective, learned, samples, micro_batch, base, skip_empty)
    if factor is not None:
        gradients = lora.scaled(gradients, factor)
    state, of_step = apply_gradients(optimizer, average, state, gradients, has_signal(samples))
    return state, metrics | of_step

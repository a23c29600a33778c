"""AdamW with a schedule, on gradients clipped to a global norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


def learning_rate(
    peak: float,
    schedule: str,
    total: int,
    warmup: int = 0,
    final_fraction: float = 0.0,
    milestones: tuple[int, ...] = (),
    milestone_factor: float = 0.1,
) -> optax.Schedule:
    """Return the rate of updates 0 .. total-1: linear warm-up from 0 over `warmup` updates, then `schedule`.

    Schedules: "constant"; "cosine", decaying to final_fraction * peak at the end; "multistep", multiplied by
    milestone_factor at each milestone (counted from the first update). Raises ValueError for any other name.
    """
    if schedule == "constant":
        main = optax.constant_schedule(peak)
    elif schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, total - warmup), final_fraction)
    elif schedule == "multistep":
        # join_schedules counts the main part from the end of the warm-up.
        main = optax.piecewise_constant_schedule(peak, {max(0, at - warmup): milestone_factor for at in milestones})
    else:
        raise ValueError(f"schedule is {schedule!r}; it must be constant, cosine or multistep.")
    if warmup == 0:
        return main
    # The first update already has the rate peak/warmup, not 0.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def adamw(
    rate: optax.Schedule, beta1: float, beta2: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Return clipping to `max_grad_norm`, then Adam with decoupled weight decay (eps 1e-8) on every parameter.

    Source: AdamW, arXiv 1711.05101.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(rate, b1=beta1, b2=beta2, eps=1e-8, weight_decay=weight_decay),
    )


def unless(skipped: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return `new`, or `old` bit for bit if the step is skipped; without a branch, which would need more memory."""
    return jax.tree.map(lambda after, before: jnp.where(skipped, before, after), new, old)


def step(
    optimizer: optax.GradientTransformation,
    gradients: Any,
    opt_state: optax.OptState,
    params: Any,
    skipped: Bool[Array, ""] | bool = False,
) -> tuple[Any, optax.OptState, Float[Array, ""]]:
    """Return (parameters after one step, the optimizer's next state, the gradients' global norm).

    A step is skipped if `skipped` is true or the norm is not finite. Parameters and state then stay unchanged, the
    optimizer's counts included: Adam's bias correction belongs to its moments, and the schedule counts only steps that
    were made, so that skipped steps do not use up the warm-up.
    """
    norm = optax.tree.norm(gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float32 to the power of its int32 count
        updates, next_state = optimizer.update(gradients, opt_state, params)
    skip = jnp.logical_or(skipped, ~jnp.isfinite(norm))
    return unless(skip, optax.apply_updates(params, updates), params), unless(skip, next_state, opt_state), norm


def largest(params: Any) -> Float[Array, ""]:
    """Return the largest absolute value of a tree's arrays; not finite if any of their values is not."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(params)]))

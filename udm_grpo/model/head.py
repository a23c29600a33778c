"""Log-probabilities of tokens from the head, with a gradient that stores no logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from udm_grpo.model.chunks import chunk_size, join, split
from udm_grpo.model.execution import ONE_DEVICE, Execution


def _row_logits(hidden: Float[Array, "r n d"], kernel: Float[Array, "d v"]) -> Float[Array, "r n v"]:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def head_logps(
    hidden: Float[Array, "s n d"],
    kernel: Float[Array, "d v"],
    action: Int[Array, "s n"],
    rows: int,
    execution: Execution = ONE_DEVICE,
) -> tuple[Float[Array, "s n"], Float[Array, "s n"]]:
    """Return (log softmax(hidden @ kernel)[action], entropy) of every token, `rows` images at a time.

    No logits are stored for the backward pass, which recomputes them chunk by chunk and sums the kernel's gradient in
    float32. If a batch is spread over devices, each sums its own part of that gradient, and the parts are reduced once.
    The entropy is a metric: no gradient flows through it.
    """
    return _head_logps_forward(hidden, kernel, action, rows, execution)[0]


def _head_logps_forward(
    hidden: Array, kernel: Array, action: Array, rows: int, execution: Execution
) -> tuple[Any, Any]:
    def chunk(work: tuple[Array, Array]) -> tuple[Array, Array]:
        features, target = work
        log_p = jax.nn.log_softmax(_row_logits(features, kernel), axis=-1)
        picked = jnp.take_along_axis(log_p, target[:, :, None], axis=-1)[:, :, 0]
        return picked, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    size = chunk_size(hidden.shape[0], rows)
    out = join(jax.lax.map(chunk, split((hidden, action), size)))
    return out, (hidden, kernel, action)


def _head_logps_backward(
    rows: int, execution: Execution, saved: tuple[Array, Array, Array], cotangent: tuple[Array, Array]
) -> Any:
    hidden, kernel, action = saved
    size = chunk_size(hidden.shape[0], rows)
    parts = execution.shards if size % execution.shards == 0 else 1

    def chunk(kernel_gradient: Array, work: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        features, target, g = work
        p = jax.nn.softmax(_row_logits(features, kernel), axis=-1)
        onehot = jax.nn.one_hot(target, kernel.shape[1], dtype=jnp.float32)
        d_logits = (g[:, :, None] * (onehot - p)).astype(kernel.dtype)
        d_hidden = jnp.einsum("rnv,dv->rnd", d_logits, kernel)
        left, right = (array.reshape(parts, -1, array.shape[-1]) for array in (features, d_logits))
        d_kernel = jnp.einsum("prd,prv->pdv", left, right, preferred_element_type=jnp.float32)
        return kernel_gradient + d_kernel, d_hidden

    start = jnp.zeros((parts, *kernel.shape), jnp.float32)
    start = execution.spread(start) if parts > 1 else start
    kernel_gradient, d_hidden = jax.lax.scan(chunk, start, split((hidden, action, cotangent[0]), size))
    return join(d_hidden), jnp.sum(kernel_gradient, axis=0).astype(kernel.dtype), None


head_logps.defvjp(_head_logps_forward, _head_logps_backward)

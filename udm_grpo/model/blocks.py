"""One layer of URSA's transformer as Flax modules: norm, linear maps, attention in both directions, SwiGLU.

Source: URSA, arXiv 2510.24717; Qwen3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from udm_grpo.model import splash
from udm_grpo.model.execution import ATTENTION_IMPLEMENTATIONS, Execution, TransformerConfig
from udm_grpo.model.rope import HEAD_DIM, rotate

RMS_NORM_EPS = 1e-6
"""Fixed by the checkpoint format."""
RotaryTable = tuple[Any, ...]
ALL_ROWS = slice(None)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 except for the multiplication by the scale."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalise the last axis."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + RMS_NORM_EPS)).astype(x.dtype)
        scale = self.scale[...]
        return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Linear(nnx.Module):
    """A matrix product over the last axis, all other axes merged first.

    As a single product of two matrices instead of one over three axes, the gradient runs 1.3 times as fast on CPU.
    """

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d_in, d_out)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Map every row."""
        kernel = self.kernel[...]
        return (x.reshape(-1, kernel.shape[0]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


class AdaptedLinear(Linear):
    """A linear map plus a low-rank one, x W + (x A) B; any factor is contained in B."""

    def __init__(self, d_in: int, d_out: int, rank: int, rngs: nnx.Rngs):
        super().__init__(d_in, d_out, rngs)
        self.lora_a = nnx.Param(jnp.zeros((d_in, rank)))
        self.lora_b = nnx.Param(jnp.zeros((rank, d_out)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Map every row."""
        a, b = self.lora_a[...], self.lora_b[...]
        low = (x.reshape(-1, a.shape[0]) @ a) @ b
        return super().__call__(x) + low.reshape(*x.shape[:-1], b.shape[1])


def attend(
    q: Float[Array, "b q heads c"],
    k: Float[Array, "b s kv c"],
    v: Float[Array, "b s kv c"],
    execution: Execution,
    rows: int | None = None,
) -> Float[Array, "b q heads c"]:
    """Return softmax(q k / sqrt(c)) v over the first `rows` keys (None: all); head i reads kv head i // (heads / kv).

    "xla" is written out here, with float32 softmax: it runs anywhere, including backward in bfloat16, and is the only
    one that takes fewer queries than keys.
    """
    rows = k.shape[1] if rows is None else rows
    if execution.attention == "cudnn":
        padded = rows < q.shape[1]
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            # Padded queries are computed like the others, so that their values are finite.
            query_seq_lengths=jnp.full(q.shape[0], q.shape[1], jnp.int32) if padded else None,
            key_value_seq_lengths=jnp.full(q.shape[0], rows, jnp.int32) if padded else None,
            implementation="cudnn",
        )
    if execution.attention == "splash":
        return splash.attend(q, k, v, rows, execution.batch)
    if execution.attention != "xla":
        raise ValueError(
            f"attention is {execution.attention!r}; it must be one of {', '.join(ATTENTION_IMPLEMENTATIONS)}."
        )
    B, S, heads, c = q.shape
    kv = k.shape[2]
    grouped = q.reshape(B, S, kv, heads // kv, c)
    scores = jnp.einsum("bqkgc,bskc->bkgqs", grouped, k, preferred_element_type=jnp.float32) * c**-0.5
    if rows < k.shape[1]:
        scores = jnp.where(jnp.arange(k.shape[1]) < rows, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bskc->bqkgc", weights, v).reshape(q.shape)


class Attention(nnx.Module):
    """Grouped-query attention without a mask: left padding is attended to like any token."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q = Linear(width, config.num_attention_heads * HEAD_DIM, rngs)
        self.k = Linear(width, config.num_key_value_heads * HEAD_DIM, rngs)
        self.v = Linear(width, config.num_key_value_heads * HEAD_DIM, rngs)
        self.o = Linear(config.num_attention_heads * HEAD_DIM, width, rngs)
        self.q_norm = RMSNorm(HEAD_DIM)
        self.k_norm = RMSNorm(HEAD_DIM)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        rope: RotaryTable,
        execution: Execution,
        rows: int | None = None,
        queries: slice = ALL_ROWS,
    ) -> Float[Array, "b q d"]:
        """Attend from the rows `queries` to the first `rows` of the sequence (None: all)."""
        B, S, _ = x.shape
        asking = x[:, queries]
        q = self.q_norm(self.q(asking).reshape(*asking.shape[:2], -1, HEAD_DIM))
        q = rotate(q, tuple(part[queries] for part in rope))
        k = rotate(self.k_norm(self.k(x).reshape(B, S, -1, HEAD_DIM)), rope)
        v = self.v(x).reshape(B, S, -1, HEAD_DIM)
        mixed = attend(q, k, v, execution, rows)
        return self.o(mixed.reshape(*asking.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.gate = Linear(config.hidden_size, config.intermediate_size, rngs)
        self.up = Linear(config.hidden_size, config.intermediate_size, rngs)
        self.down = Linear(config.intermediate_size, config.hidden_size, rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Apply the MLP to every token independently."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size)
        self.attn = Attention(config, rngs)
        self.post_norm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        rope: RotaryTable,
        execution: Execution,
        rows: int | None = None,
        queries: slice = ALL_ROWS,
    ) -> Float[Array, "b q d"]:
        """Apply residual attention, then the residual MLP; return the rows `queries`."""
        x = x[:, queries] + self.attn(self.input_norm(x), rope, execution, rows, queries)
        return x + self.mlp(self.post_norm(x))

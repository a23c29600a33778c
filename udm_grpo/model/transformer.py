"""URSA's transformer: a Qwen3 trunk with bidirectional attention over [text, BOV, image tokens].

Flax modules describe one block; `nnx.split` is called once, and from then on parameters are a plain nested dict whose
block leaves are stacked over the layers on axis 0, so that in a deep model a `lax.scan` runs over the layers and compile
time does not grow with their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from udm_grpo.batches import Params
from udm_grpo.model import splash
from udm_grpo.model.rope import HEAD_DIM, positions, rotary_table, rotate
from udm_grpo.model.sizes import check_sizes

RMS_NORM_EPS = 1e-6
"""Fixed by the checkpoint format."""
ATTENTION_IMPLEMENTATIONS = ("xla", "cudnn", "splash")
"""Values of `Execution.attention`: plain XLA anywhere, cuDNN's flash attention on NVIDIA GPUs (bfloat16), JAX's splash
kernel on TPUs."""
REMAT_POLICIES = ("none", "dots", "full")
ADAPTER = ("lora_a", "lora_b")
"""The additional leaves of a linear map that has a low-rank adapter."""

RotaryTable = tuple[Any, ...]
ALL_ROWS = slice(None)
MAX_UNROLLED = 8
"""Number of layers up to which the blocks are unrolled, and the last one computes the image rows only. A loop over the
layers copies into and out of stacked arrays, which in a small model takes a third of an update on CPU."""


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes in transformer/config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rope_theta: int | float
    vocab_size: int
    lm_vocab_size: int
    lm_head_size: int
    bov_token_id: int

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> "TransformerConfig":
        """Read the sizes from the parsed config.json; raises ValueError naming fields that are missing or invalid."""
        missing = [field.name for field in fields(cls) if field.name not in config]
        if missing:
            raise ValueError(f"transformer config.json lacks {', '.join(missing)}; found {', '.join(sorted(config))}.")
        check_sizes(config)
        sizes = cls(**{field.name: config[field.name] for field in fields(cls)})
        if sizes.vocab_size != sizes.lm_vocab_size + sizes.lm_head_size:
            raise ValueError(
                f"transformer config.json: vocab_size is {sizes.vocab_size}, but lm_vocab_size + lm_head_size is "
                f"{sizes.lm_vocab_size} + {sizes.lm_head_size}."
            )
        if sizes.num_attention_heads % sizes.num_key_value_heads:
            raise ValueError(
                f"transformer config.json: num_attention_heads {sizes.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {sizes.num_key_value_heads}."
            )
        return sizes


@dataclass(frozen=True)
class Execution:
    """How the trunk is computed; affects speed and memory, never the result beyond rounding."""

    attention: str = "xla"
    """One of ATTENTION_IMPLEMENTATIONS."""
    remat: str = "none"
    """What the backward pass recomputes: nothing, all but matrix products ("dots"), or whole blocks ("full")."""
    batch: Any = None
    """Sharding of arrays whose first axis is the batch; None leaves it to the compiler."""
    head: Any = None
    """Sharding of the head's kernel while logits are computed; None leaves it unchanged."""
    layers: Any = None
    """Function that prepares the parameters of all blocks for the loop over them; None leaves them unchanged."""
    shards: int = 1
    """Number of devices that a batch is spread over."""
    multiple: int = 1
    """The sequence is padded at the embedding to a multiple of this, with rows that no row attends to and that are
    dropped at the end. 1, or 2 for "cudnn", whose gradient JAX refuses for an odd number of rows."""

    def padded_rows(self, rows: int) -> int:
        """Return the rows of the sequence inside the trunk."""
        multiple = max(self.multiple, 2 if self.attention == "cudnn" else 1)
        return -(-rows // multiple) * multiple

    def spread(self, x: Array) -> Array:
        """Constrain a batch to stay spread over its devices: the compiler might shard the width like the weights'."""
        return x if self.batch is None else jax.lax.with_sharding_constraint(x, self.batch)

    def with_head(self, params: Params) -> Params:
        """Return the parameters with the head's kernel gathered once, instead of for every chunk of rows."""
        if self.head is None:
            return params
        return {**params, "lm_head": jax.lax.with_sharding_constraint(params["lm_head"], self.head)}


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


@functools.lru_cache(maxsize=16)
def _block_graph(config: TransformerConfig, adapted: tuple[tuple[str, str], ...] = ()) -> nnx.GraphDef:
    """Return the graph of a block whose linear maps (part, name) have an adapter; it does not depend on shapes."""

    def make() -> Block:
        block = Block(config, nnx.Rngs(0))
        for part, name in adapted:
            setattr(getattr(block, part), name, AdaptedLinear(1, 1, 1, nnx.Rngs(0)))
        return block

    return nnx.split(nnx.eval_shape(make))[0]


def _adapted(layers: Params) -> tuple[tuple[str, str], ...]:
    """Return (part, name) of the linear maps that have an adapter."""
    parts = ((part, name, leaves) for part in ("attn", "mlp") for name, leaves in layers[part].items())
    return tuple((part, name) for part, name, leaves in parts if ADAPTER[0] in leaves)


def init(config: TransformerConfig, key: Array) -> Params:
    """Return new float32 parameters: normal(0.02) matrices, unit norms."""
    embed_key, head_key, *layer_keys = jax.random.split(key, 2 + config.num_hidden_layers)
    layers = [nnx.to_pure_dict(nnx.state(Block(config, nnx.Rngs(layer_key)))) for layer_key in layer_keys]
    return {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, (config.vocab_size, config.hidden_size))},
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm": {"scale": jnp.ones(config.hidden_size)},
        "lm_head": {"kernel": 0.02 * jax.random.normal(head_key, (config.hidden_size, config.lm_head_size))},
    }


def abstract(config: TransformerConfig) -> Params:
    """Return the parameter tree as float32 `jax.ShapeDtypeStruct`.

    A single block is traced for all layers, since tracing 28 takes seconds.
    """
    tree = jax.eval_shape(lambda: init(dataclasses.replace(config, num_hidden_layers=1), jax.random.key(0)))
    layers = config.num_hidden_layers
    deep = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape[1:]), leaf.dtype), tree["layers"])
    return tree | {"layers": deep}


def input_ids(
    config: TransformerConfig, prompt_ids: Int[Array, "b l"], image_ids: Int[Array, "b n"]
) -> Int32[Array, "b s"]:
    """Return the sequence [text, BOV, lm_vocab_size + code] of S = L + 1 + N tokens."""
    bov = jnp.full((prompt_ids.shape[0], 1), config.bov_token_id, jnp.int32)
    image = image_ids.astype(jnp.int32) + jnp.int32(config.lm_vocab_size)
    return jnp.concatenate([prompt_ids.astype(jnp.int32), bov, image], axis=1)


def _rematerialised(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    if policy == "none":
        return body
    if policy == "dots":
        return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    if policy == "full":
        return jax.checkpoint(body)
    raise ValueError(f"remat is {policy!r}; it must be one of {', '.join(REMAT_POLICIES)}.")


def hidden_states(
    config: TransformerConfig,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    image_ids: Int[Array, "b n"],
    grid: tuple[int, int],
    execution: Execution = Execution(),
) -> Float[Array, "b s d"]:
    """Return the trunk's output at all S = L + 1 + N rows, after the last norm, in the dtype of `params`.

    `grid` is (h, w) with h*w = N. The logits of image token n are read one position to the left, at row L + n.
    `params` may hold an adapter (`lora.attach`).

    Source: URSA, arXiv 2510.24717; Qwen3.
    """
    return _trunk(config, params, prompt_ids, image_ids, grid, execution, ALL_ROWS)


def image_features(
    config: TransformerConfig,
    params: Params,
    prompt_ids: Int[Array, "b l"],
    image_ids: Int[Array, "b n"],
    grid: tuple[int, int],
    execution: Execution = Execution(),
) -> Float[Array, "b n d"]:
    """Return `hidden_states` at the rows that predict the N image tokens: L .. L + N - 1.

    In a shallow model the last block computes these rows alone.
    """
    tokens, length = image_ids.shape[1], prompt_ids.shape[1]
    whole = config.num_hidden_layers > MAX_UNROLLED or execution.attention != "xla"
    if whole or execution.padded_rows(length + 1 + tokens) > length + 1 + tokens:
        return image_rows(hidden_states(config, params, prompt_ids, image_ids, grid, execution), tokens)
    return _trunk(config, params, prompt_ids, image_ids, grid, execution, slice(length, length + tokens))


def _trunk(
    config: TransformerConfig,
    params: Params,
    prompt_ids: Array,
    image_ids: Array,
    grid: tuple[int, int],
    execution: Execution,
    queries: slice,
) -> Array:
    """Return the output at all rows; of a shallow model and an unpadded sequence also at those of `queries` alone."""
    if grid[0] * grid[1] != image_ids.shape[1]:
        raise ValueError(f"image_ids has {image_ids.shape[1]} tokens an image, but the grid is {grid[0]} x {grid[1]}.")
    at = positions(prompt_ids.shape[1], *grid)
    rows = len(at)
    added = execution.padded_rows(rows) - rows
    rope = rotary_table(np.pad(at, ((0, added), (0, 0))), float(config.rope_theta))
    graph = _block_graph(config, _adapted(params["layers"]))

    def block(x: Array, layer: Params, queries: slice = ALL_ROWS) -> tuple[Array, None]:
        return execution.spread(nnx.merge(graph, layer)(x, rope, execution, rows, queries)), None

    x = jnp.asarray(params["embed"]["embedding"])[input_ids(config, prompt_ids, image_ids)]
    x = execution.spread(jnp.pad(x, ((0, 0), (0, added), (0, 0))) if added else x)
    layers = params["layers"] if execution.layers is None else execution.layers(params["layers"])
    depth = config.num_hidden_layers
    if depth > MAX_UNROLLED:
        x, _ = jax.lax.scan(_rematerialised(block, execution.remat), x, layers)
    else:
        for index in range(depth):
            of_block = functools.partial(block, queries=queries if index == depth - 1 else ALL_ROWS)
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
            x, _ = _rematerialised(of_block, execution.remat)(x, layer)
    x = x[:, :rows] if added else x
    norm_graph = nnx.split(nnx.eval_shape(lambda: RMSNorm(config.hidden_size)))[0]
    return execution.spread(nnx.merge(norm_graph, params["norm"])(x))


def image_rows(hidden: Float[Array, "b s d"], tokens: int) -> Float[Array, "b n d"]:
    """Return the rows that predict the N image tokens: L .. L + N - 1, the last N + 1 without the very last."""
    return hidden[:, -tokens - 1 : -1]


def head(params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Return logits over the V codes, accumulated in float32."""
    return jnp.matmul(hidden, params["lm_head"]["kernel"], preferred_element_type=jnp.float32)

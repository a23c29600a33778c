"""URSA's transformer: a Qwen3 trunk with bidirectional attention over [text, BOV, image tokens].

Flax modules describe one block; `nnx.split` is called once, and from then on parameters are a plain nested dict whose
block leaves are stacked over the layers on axis 0, so that in a deep model a `lax.scan` runs over the layers and
compile time does not grow with their number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from udm_grpo.batches import Params
from udm_grpo.model.blocks import ALL_ROWS, AdaptedLinear, Block, RMSNorm
from udm_grpo.model.execution import ONE_DEVICE, REMAT_POLICIES, Execution, TransformerConfig
from udm_grpo.model.rope import positions, rotary_table

ADAPTER = ("lora_a", "lora_b")
"""The additional leaves of a linear map that has a low-rank adapter."""
MAX_UNROLLED = 8
"""Number of layers up to which the blocks are unrolled, and the last one computes the image rows only. A loop over the
layers copies into and out of stacked arrays, which in a small model takes a third of an update on CPU."""


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
    execution: Execution = ONE_DEVICE,
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
    execution: Execution = ONE_DEVICE,
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

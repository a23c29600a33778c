"""Low-rank adapters (LoRA) of the transformer: trained next to a frozen base, as a separate tree.

An adapter has the structure of the parameters, but only for the adapted linear maps, with two matrices for each:

    {"layers": {"attn": {"q": {"lora_a": f32[layers, in, r], "lora_b": f32[layers, r, out]}, ...}, ...}}

An adapted map computes x W + (alpha / r) (x A) B. The factor is multiplied into B when a policy is built (`scaled`), so
that the transformer does not need it.

Source: LoRA, arXiv 2106.09685.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from udm_grpo.batches import Params
from udm_grpo.config import LoraConfig
from udm_grpo.model import transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.model.transformer import ADAPTER

MAPS = {
    **{f"{name}_proj": ("attn", name) for name in ("q", "k", "v", "o")},
    **{f"{name}_proj": ("mlp", name) for name in ("gate", "up", "down")},
}
"""The maps that can be adapted: name in PyTorch -> (part of a block, linear map)."""


def targets(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names in MAPS that match any of the patterns (q_proj, *_proj); they are adapted in every layer.

    Raises ValueError if a pattern matches nothing or there are no patterns.
    """
    lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in MAPS)]
    if lost or not patterns:
        problem = f"{', '.join(map(repr, lost))} matches nothing" if lost else "it is empty"
        raise ValueError(f"{problem}; choose from {', '.join(MAPS)}, or patterns of these such as *_proj")
    return tuple(name for name in MAPS if any(fnmatchcase(name, pattern) for pattern in patterns))


def factor(config: LoraConfig) -> float:
    """Return alpha / r."""
    return config.alpha / config.rank


def abstract(config: TransformerConfig, rank: int, names: Sequence[str]) -> Params:
    """Return an adapter of the maps `names` as float32 `jax.ShapeDtypeStruct`.

    Raises ValueError if the rank is larger than the smaller side of a map.
    """
    layers = transformer.abstract(config)["layers"]
    parts: Params = {}
    too_small = []
    for name in names:
        part, linear = MAPS[name]
        depth, d_in, d_out = layers[part][linear]["kernel"].shape
        if rank > min(d_in, d_out):
            too_small.append(f"{name} is {d_in} x {d_out}")
        shapes = {"lora_a": (depth, d_in, rank), "lora_b": (depth, rank, d_out)}
        parts.setdefault(part, {})[linear] = {
            leaf: jax.ShapeDtypeStruct(shapes[leaf], jnp.dtype(jnp.float32)) for leaf in ADAPTER
        }
    if too_small:
        raise ValueError(
            f"the rank is {rank}, more than the smaller side of {', '.join(too_small)}; choose a lower one"
        )
    return {"layers": parts}


def init(adapter: Params, key: Key[Array, ""]) -> Params:
    """Return a new adapter like the abstract one: A uniform in +- 1/sqrt(in), B zero, so that it has no effect yet."""
    leaves, form = jax.tree_util.tree_flatten_with_path(adapter)
    values = []
    for index, (path, leaf) in enumerate(leaves):
        if path[-1].key == "lora_b":
            values.append(jnp.zeros(leaf.shape, jnp.float32))
        else:
            bound = leaf.shape[1] ** -0.5
            drawn = jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, jnp.float32, -bound, bound)
            values.append(drawn)
    return jax.tree.unflatten(form, values)


def scaled(adapter: Params, by: float) -> Params:
    """Return the adapter with every B multiplied by `by`; being linear, it also maps a gradient back."""

    def one(path: tuple, leaf: Array | np.ndarray) -> Array | np.ndarray:
        return leaf * by if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(one, adapter)


def attach(base: Params, adapter: Params) -> Params:
    """Return the parameters of the adapted transformer, without copying any leaf; an adapter of `base` is replaced."""
    adapted = dict(base)
    for name, part in adapter.items():
        adapted[name] = attach(base[name], part) if name in base and isinstance(part, dict) else part
    return adapted


def detach(adapted: Params, adapter: Params) -> Params:
    """Return the leaves of the adapted parameters that belong to an adapter with the structure of `adapter`."""
    return {
        name: detach(adapted[name], part) if isinstance(part, dict) else adapted[name] for name, part in adapter.items()
    }


def merge(base: Params, adapter: Params) -> Params:
    """Return the base with W + A B for every adapted W; the adapter must be `scaled`, and both on device or on host."""
    layers = dict(base["layers"])
    for part, maps in adapter["layers"].items():
        layers[part] = dict(layers[part])
        for linear, both in maps.items():
            kernel = layers[part][linear]["kernel"] + both["lora_a"] @ both["lora_b"]
            layers[part][linear] = {"kernel": kernel}
    return {**base, "layers": layers}

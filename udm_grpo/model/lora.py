"""Low-rank adapters of the transformer: what is trained beside a frozen base, as a tree of its own.

An adapter has the shape of the parameters, but only of the linear maps that are adapted, with two matrices for each:

    {"layers": {"attn": {"q": {"lora_a": f32[layers, in, r], "lora_b": f32[layers, r, out]}, ...}, ...}}

An adapted map computes x W + (alpha / r) (x A) B. The factor is multiplied into B when a policy is made (`scaled`), so
that the transformer knows nothing of it.

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
from udm_grpo.model.transformer import ADAPTER, TransformerConfig

MAPS = {
    **{f"{name}_proj": ("attn", name) for name in ("q", "k", "v", "o")},
    **{f"{name}_proj": ("mlp", name) for name in ("gate", "up", "down")},
}
"""What can be adapted: its name in PyTorch -> (part of a block, linear map)."""


def targets(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the names in MAPS that any of the patterns (q_proj, *_proj) matches; raises ValueError for one that has no
    match.

    Every layer is adapted alike.
    """
    lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in MAPS)]
    if lost or not patterns:
        found = f"{', '.join(map(repr, lost))} matches nothing" if lost else "it is empty"
        raise ValueError(f"{found}; choose from {', '.join(MAPS)}, or patterns of these such as *_proj")
    return tuple(name for name in MAPS if any(fnmatchcase(name, pattern) for pattern in patterns))


def factor(given: LoraConfig) -> float:
    """alpha / r."""
    return given.alpha / given.rank


def abstract(config: TransformerConfig, rank: int, names: Sequence[str]) -> Params:
    """Return an adapter of the maps `names` as float32 `jax.ShapeDtypeStruct`.

    Raises ValueError for a rank above the smaller side of a map, which it could not use.
    """
    layers = transformer.abstract(config)["layers"]
    made: Params = {}
    too_small = []
    for name in names:
        part, linear = MAPS[name]
        depth, d_in, d_out = layers[part][linear]["kernel"].shape
        if rank > min(d_in, d_out):
            too_small.append(f"{name} is {d_in} x {d_out}")
        shapes = {"lora_a": (depth, d_in, rank), "lora_b": (depth, rank, d_out)}
        made.setdefault(part, {})[linear] = {
            leaf: jax.ShapeDtypeStruct(shapes[leaf], jnp.dtype(jnp.float32)) for leaf in ADAPTER
        }
    if too_small:
        raise ValueError(
            f"the rank is {rank}, more than the smaller side of {', '.join(too_small)}; choose a lower one"
        )
    return {"layers": made}


def init(adapter: Params, key: Key[Array, ""]) -> Params:
    """Return a fresh adapter in the form of the abstract one: A uniform in +- 1/sqrt(in), B zero: it changes nothing
    yet.
    """
    leaves, form = jax.tree_util.tree_flatten_with_path(adapter)
    made = []
    for index, (path, leaf) in enumerate(leaves):
        if path[-1].key == "lora_b":
            made.append(jnp.zeros(leaf.shape, jnp.float32))
        else:
            bound = leaf.shape[1] ** -0.5
            drawn = jax.random.uniform(jax.random.fold_in(key, index), leaf.shape, jnp.float32, -bound, bound)
            made.append(drawn)
    return jax.tree.unflatten(form, made)


def scaled(adapter: Params, by: float) -> Params:
    """Return the adapter with every B times `by`; also the way back of a gradient through it, the map being linear."""

    def one(path: tuple, leaf: Array | np.ndarray) -> Array | np.ndarray:
        return leaf * by if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(one, adapter)


def attach(base: Params, adapter: Params) -> Params:
    """Return the parameters of the adapted transformer; the leaves are those given, none is copied."""
    made = dict(base)
    for name, part in adapter.items():
        made[name] = attach(base[name], part) if name in base else part
    return made


def merge(base: Params, adapter: Params) -> Params:
    """Return the base with W + A B for every adapted W; the adapter is `scaled`, both on one side, devices or host."""
    layers = dict(base["layers"])
    for part, maps in adapter["layers"].items():
        layers[part] = dict(layers[part])
        for linear, both in maps.items():
            kernel = layers[part][linear]["kernel"] + both["lora_a"] @ both["lora_b"]
            layers[part][linear] = {"kernel": kernel}
    return {**base, "layers": layers}

"""How PyTorch's state-dict names map onto parameter trees: one table a model, used in both directions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from udm_grpo.batches import Params

KEEP = "keep"
"""The same axes on both sides."""
KERNEL = "kernel"
"""PyTorch's (out, in, *space) is the tree's (*space, in, out): linear layers and convolutions."""

Table = tuple[tuple[str, str, str], ...]

TRANSFORMER_TABLE: Table = (
    ("embed/embedding", "model.embed_tokens.weight", KEEP),
    ("layers/input_norm/scale", "model.layers.{layer}.input_layernorm.weight", KEEP),
    ("layers/post_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", KEEP),
    ("layers/attn/{norm}/scale", "model.layers.{layer}.self_attn.{norm}.weight", KEEP),
    ("layers/attn/{name}/kernel", "model.layers.{layer}.self_attn.{name}_proj.weight", KERNEL),
    ("layers/mlp/{name}/kernel", "model.layers.{layer}.mlp.{name}_proj.weight", KERNEL),
    ("norm/scale", "model.norm.weight", KEEP),
    ("lm_head/kernel", "lm_head.weight", KERNEL),
)
"""(path in the tree, name in the file, how the axes go). {layer} is axis 0 of the tree's array; any other {word} stands
for the same text on both sides. The first row that fits holds."""

VQ_TABLE: Table = (
    ("codebook/embedding", "quantizer.embedding.weight", KEEP),
    ("{module}/kernel", "{module}.weight", KERNEL),
    ("{module}/scale", "{module}.weight", KEEP),
    ("{module}/bias", "{module}.bias", KEEP),
)
"""As TRANSFORMER_TABLE."""

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one of its tensors; the dtype by its NumPy name where NumPy has it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """Where a tensor of a file lies in the tree."""

    path: str
    """Of the leaf."""
    layer: int | None
    """Index on the leaf's axis 0, where it stacks layers."""
    transform: str
    """KEEP or KERNEL."""
    shape: tuple[int, ...]
    """That the tensor must have in the file."""


def leaves_by_path(tree: Params) -> dict[str, Any]:
    """Return the tree's leaves under names like layers/attn/q/kernel."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def sources(table: Table, tree: Params) -> dict[str, Source]:
    """Return, for every tensor name that a file of this (perhaps abstract) tree holds, where it lies in the tree.

    Raises KeyError for a leaf that the table has no row for.
    """
    found = dict[str, Source]()
    for path, leaf in leaves_by_path(tree).items():
        name, transform = _row_for(table, path)
        if "{layer}" in name:
            shape = _turned(tuple(leaf.shape[1:]), transform)
            found |= {name.format(layer=i): Source(path, i, transform, shape) for i in range(leaf.shape[0])}
        else:
            found[name] = Source(path, None, transform, _turned(tuple(leaf.shape), transform))
    return found


def problems(wanted: Mapping[str, Source], found: Mapping[str, TensorInfo]) -> list[str]:
    """Return a line for every missing, superfluous or misshapen tensor, and for every one that is not of floats."""
    lines = [f"missing: {name}, shape {source.shape}" for name, source in wanted.items() if name not in found]
    lines += [f"not known: {name}, shape {info.shape}" for name, info in found.items() if name not in wanted]
    for name, source in wanted.items():
        if name not in found:
            continue
        info = found[name]
        if info.shape != source.shape:
            lines.append(f"wrong shape: {name} is {info.shape}, wanted {source.shape}")
        if info.dtype not in FLOATS:
            lines.append(f"wrong dtype: {name} is {info.dtype}, wanted one of {', '.join(FLOATS)}")
    return lines


def from_tree(source: Source, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return one tensor of a file, in the tree's dtype, out of the tree's leaves by path."""
    leaf = leaves[source.path]
    return backward(leaf if source.layer is None else leaf[source.layer], source.transform)


def _row_for(table: Table, path: str) -> tuple[str, str]:
    """Return (name with {layer} left open, transform) of the first row that fits a path."""
    for pattern, name, transform in table:
        match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>.+)", pattern), path)
        if match:
            words = {word: text.replace("/", ".") for word, text in match.groupdict().items()}
            return name.format(layer="{layer}", **words), transform
    raise KeyError(f"no row of the weight table fits {path}; add one")


def forward(tensor: np.ndarray, transform: str) -> np.ndarray:
    """Return a file's tensor, or rows of it, with the tree's axes."""
    if transform == KEEP:
        return tensor
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def backward(array: np.ndarray, transform: str) -> np.ndarray:
    """Return a tree's array with the file's axes."""
    if transform == KEEP:
        return array
    space = range(array.ndim - 2)
    return array.transpose(array.ndim - 1, array.ndim - 2, *space)


def _turned(shape: tuple[int, ...], transform: str) -> tuple[int, ...]:
    return shape if transform == KEEP else (shape[-1], shape[-2], *shape[:-2])

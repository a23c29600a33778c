"""How PyTorch's state-dict names map onto parameter trees: one table per model, used in both directions."""

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
"""(path in the tree, name in the file, KEEP or KERNEL). {layer} is the index on axis 0 of the tree's array; any other
{word} stands for the same text on both sides. The first row that matches applies."""

VQ_TABLE: Table = (
    ("codebook/embedding", "quantizer.embedding.weight", KEEP),
    ("{module}/kernel", "{module}.weight", KERNEL),
    ("{module}/scale", "{module}.weight", KEEP),
    ("{module}/bias", "{module}.bias", KEEP),
)
"""In the form of TRANSFORMER_TABLE."""

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file; the dtype has its NumPy name where NumPy has it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """Where a tensor of a file belongs in the tree."""

    path: str
    """Path of the leaf."""
    layer: int | None
    """Index on the leaf's axis 0, if it stacks layers."""
    transform: str
    """KEEP or KERNEL."""
    shape: tuple[int, ...]
    """Shape that the tensor must have in the file."""


def leaves_by_path(tree: Params) -> dict[str, Any]:
    """Return the tree's leaves under names like layers/attn/q/kernel."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def sources(table: Table, tree: Params) -> dict[str, Source]:
    """Return, for the name of every tensor in a file of this (perhaps abstract) tree, where it belongs in the tree.

    Raises KeyError for a leaf that no row of the table matches.
    """
    by_name = dict[str, Source]()
    for path, leaf in leaves_by_path(tree).items():
        name, transform = _row_for(table, path)
        if "{layer}" in name:
            shape = _turned(tuple(leaf.shape[1:]), transform)
            by_name |= {name.format(layer=i): Source(path, i, transform, shape) for i in range(leaf.shape[0])}
        else:
            by_name[name] = Source(path, None, transform, _turned(tuple(leaf.shape), transform))
    return by_name


def problems(expected: Mapping[str, Source], infos: Mapping[str, TensorInfo]) -> list[str]:
    """Return a line for every tensor that is missing, superfluous, misshapen or not of a floating-point dtype."""
    lines = [f"missing: {name}, shape {source.shape}" for name, source in expected.items() if name not in infos]
    lines += [f"not known: {name}, shape {info.shape}" for name, info in infos.items() if name not in expected]
    for name, source in expected.items():
        if name not in infos:
            continue
        info = infos[name]
        if info.shape != source.shape:
            lines.append(f"wrong shape: {name} is {info.shape}, expected {source.shape}")
        if info.dtype not in FLOATS:
            lines.append(f"wrong dtype: {name} is {info.dtype}, expected one of {', '.join(FLOATS)}")
    return lines


def from_tree(source: Source, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return one tensor of a file, in the tree's dtype, from the tree's leaves by path."""
    leaf = leaves[source.path]
    return backward(leaf if source.layer is None else leaf[source.layer], source.transform)


def _row_for(table: Table, path: str) -> tuple[str, str]:
    """Return (name with {layer} not filled in, transform) of the first row that matches a path."""
    for pattern, name, transform in table:
        match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>.+)", pattern), path)
        if match:
            words = {word: text.replace("/", ".") for word, text in match.groupdict().items()}
            return name.format(layer="{layer}", **words), transform
    raise KeyError(f"no row of the weight table matches {path}; add one")


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

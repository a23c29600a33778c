"""The leaves of a state by name: which can be saved, what they are restored as, and how two states differ."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

MAX_SHOWN = 5  # differences of one kind that an error lists; the rest are only counted
SAMPLE_BYTES = 1 << 10
State = Any  # a pytree of arrays


def savable_leaves(state: State) -> dict[str, Any]:
    """Return the leaves to save, by name; raise TypeError listing those that cannot be saved."""
    leaves = by_name(state)
    wrong = []
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            wrong.append(f"{name} is {type(leaf).__name__}: store it as np.int32(...) or np.float32(...), or in meta")
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            wrong.append(f"{name} is a random key: store its jax.random.key_data, or recreate it from the seed")
        elif leaf.size == 0:
            wrong.append(f"{name} has no elements, shape {leaf.shape}: leave it out")
    if wrong:
        raise TypeError("\n  ".join(["only arrays can be saved:", *some(wrong)]))
    return {name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for name, leaf in leaves.items()}


def sample_of(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return {name: copy on the host} of one small leaf; empty if it is sharded over processes.

    It is the smallest leaf of at least SAMPLE_BYTES, which has a file of its own, or else the largest leaf.
    """
    large = [name for name, leaf in leaves.items() if leaf.nbytes >= SAMPLE_BYTES]
    name = min(large, key=lambda name: leaves[name].nbytes, default="")
    name = name or max(leaves, key=lambda name: leaves[name].nbytes, default="")
    leaf = leaves.get(name)
    if leaf is None or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return {}
    return {name: np.array(leaf)}


def abstract_leaves(state: State) -> dict[str, Any]:
    """Return the abstract array that Orbax is to restore for each leaf, by name."""
    leaves = by_name(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray | np.generic):
            leaves[name] = np.empty(leaf.shape, leaf.dtype)
        elif isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        else:
            advice = "pass a jax.ShapeDtypeStruct or an array"
            raise TypeError(f"{name} of the abstract state is {type(leaf).__name__}: {advice}")
    return leaves


def by_name(tree: Any, separator: str = "/", is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the tree's leaves in their order, named like "opt_state/0/mu/head"."""
    named = dict[str, Any]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=separator)
        if name in named:
            raise ValueError(f"two leaves are both named {name}: rename one of the keys in their paths")
        named[name] = leaf
    return named


def differences(saved: Mapping[str, Any], expected: Mapping[str, Any], partial: bool) -> list[str]:
    """Return a line for each kind of difference between the leaves: names, shapes and dtypes."""
    here, there = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in side.items()} for side in (expected, saved)
    )
    kinds = {
        "missing": [name for name in here if name not in there],
        "unexpected": [name for name in there if name not in here and not partial],
        "of another shape or dtype": [
            f"{name} is {there[name]}, expected {form}" for name, form in here.items() if there.get(name, form) != form
        ],
    }
    return [f"{len(names)} {kind}: {'; '.join(some(names))}" for kind, names in kinds.items() if names]


def some(items: list[str]) -> list[str]:
    """Return the first MAX_SHOWN lines, and one with the number of further ones."""
    return items[:MAX_SHOWN] + ([f"... and {len(items) - MAX_SHOWN} more"] if len(items) > MAX_SHOWN else [])

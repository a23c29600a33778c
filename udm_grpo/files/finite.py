"""Detect numbers that are not finite: in arrays, by the names of the tensors, and in command-line flags."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_NAMED = 5
"""Tensors that an error names; the others are counted."""


def nonfinite(leaves: Mapping[str, Any]) -> list[str]:
    """Return the names of the arrays, JAX's or NumPy's, that hold NaN or an infinity.

    No copy of an array is made: NaN passes through a maximum and a minimum, and an infinity is one of the two.
    With several processes, all must call this alike.
    """
    return [name for name, leaf in leaves.items() if not all(map(math.isfinite, _extremes(leaf)))]


def _extremes(leaf: Any) -> tuple[float, float]:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size == 0:
        return 0.0, 0.0
    if isinstance(leaf, jax.Array) and not _on_this_host(leaf):
        return float(jnp.max(leaf)), float(jnp.min(leaf))
    array = np.asarray(leaf)
    with np.errstate(invalid="ignore"):
        return float(np.max(array)), float(np.min(array))


def _on_this_host(leaf: jax.Array) -> bool:
    """Return whether NumPy can read an array without a copy from a device, so that nothing has to be compiled."""
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def named(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are, as text."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def finite_number(text: str) -> float:
    """Return the number of a command-line flag, as argparse's `type`; refuse NaN and infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value

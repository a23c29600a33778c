"""Numbers that are not finite: found in arrays by the names of the tensors that hold them, and refused in flags."""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MAX_NAMED = 5
"""Tensors that an error names; further ones are counted."""


def nonfinite(leaves: Mapping[str, Any]) -> list[str]:
    """Return the names of the arrays, JAX's or NumPy's, that hold NaN or an infinity.

    Nothing of the size of an array is made: NaN passes through a maximum and a minimum, and infinities are one of them.
    With several processes all of them call this alike.
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
    """Return whether NumPy can look at an array without a copy from a device; then nothing is compiled."""
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def named(names: Sequence[str]) -> str:
    """Return the first names in words."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def finite_number(text: str) -> float:
    """Return the number of a command-line flag, as argparse's `type`; refuses NaN and infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value

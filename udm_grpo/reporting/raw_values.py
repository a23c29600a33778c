"""Raw values of scorers by name: joined over batches, which may have different names, and averaged."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

Raw = Mapping[str, Float[np.ndarray, " b"]]
"""By name; NaN for an image for which the scorer gave no such value."""


def joined(parts: Sequence[Raw], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the concatenated raw values of batches of these sizes, under every name that any batch has."""
    names = dict.fromkeys(name for part in parts for name in part)
    lacking = [np.full(size, np.nan, np.float32) for size in sizes]
    return {
        name: np.concatenate([part.get(name, none) for part, none in zip(parts, lacking, strict=True)])
        for name in names
    }


def means(raw: Raw) -> dict[str, float]:
    """Return the mean of each value over the images that have it; names that no image has are left out."""
    known = {name: values[~np.isnan(values)] for name, values in raw.items()}
    return {name: float(np.mean(values)) for name, values in known.items() if len(values)}


def missing(raw: Raw) -> dict[str, int]:
    """Return how many images lack a value, by its name; names that all images have are left out."""
    lacking = {name: int(np.sum(np.isnan(values))) for name, values in raw.items()}
    return {name: count for name, count in lacking.items() if count}

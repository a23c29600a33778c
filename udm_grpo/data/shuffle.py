"""Seeded permutations that are the same on every machine and with every version of NumPy.

They sort the raw 64-bit words of the Philox counter generator, the part of NumPy that is fixed across its versions.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int32

SCHEDULE, POOL, FIXED, GENERATE, MIX = range(5)
"""Purposes of a shuffle; no two of them share random words."""


@lru_cache(maxsize=64)
def shuffle(seed: int, purpose: int, pool: int, epoch: int, n: int) -> Int32[np.ndarray, " n"]:
    """Return a read-only permutation of range(n) that depends on the arguments alone."""
    words = np.random.Philox(key=seed % 2**64, counter=[0, purpose, pool, epoch]).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order

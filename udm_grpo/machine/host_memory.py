"""Keeps the memory that a program on CPU has freed, for the next one.

A compiled program takes its working memory, hundreds of MiB, at every call and gives it back at the end. glibc hands
blocks of that size back to the system at once, and the system clears each of their pages anew when they are touched:
of an update of a small model that is a fifth of the time.
"""

import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 2**31 - 1
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which users choose an allocator or its settings; then nothing is changed."""


def keep_freed_memory() -> bool:
    """Let glibc keep all memory that this process frees, in one arena; return whether that was possible.

    Only for a process that computes on CPU, before it starts threads: an arena that exists is used further. Does
    nothing without glibc or where the environment has settings of its own.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    settings = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST, M_ARENA_MAX: 1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def may_have_accelerators(platforms: str | None) -> bool:
    """Return whether JAX may find something else than CPUs; platforms: its setting `jax_platforms`, None for any.

    Looks at device files alone, so that no backend starts.
    """
    if platforms:
        return platforms != "cpu"
    patterns = ("nvidia[0-9]*", "accel*", "kfd", "vfio/[0-9]*")  # of NVIDIA, TPUs, AMD, and newer TPUs
    return any(next(Path("/dev").glob(pattern), None) for pattern in patterns)

"""Compiled programs that the next start finds, in a folder beside the outputs.

JAX loads them as machine code, so a folder counts only if nobody but this user can write to it. Programs of a CPU have
its own instructions in them: every kind of CPU has a folder of its own, for outputs may lie on a disk that machines
share. JAX tells programs apart by what was traced, its own version, its flags and the devices.
"""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

FOLDER = ".compiled"
"""The name of the folder, beside output_dir."""
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@contextlib.contextmanager
def kept_programs(outputs: Path) -> Iterator[None]:
    """Within the block, store compiled programs in `outputs`/.compiled and load those that are there.

    Does nothing where JAX_COMPILATION_CACHE_DIR is set. Warns, and stores nothing, where the folder cannot be created
    or another user may write to it.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        yield
        return
    folder = outputs / FOLDER / _kind_of_cpu()
    if problem := _problem(folder):
        advice = "remove it, set JAX_COMPILATION_CACHE_DIR to another folder, or set compilation_cache to False"
        print(f"warning: compiled programs are not kept: {problem}; {advice}", file=sys.stderr)
        yield
        return
    _use(str(folder))
    try:
        yield
    finally:
        _use(None)


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    reset_cache()  # JAX looks at the setting once, before it compiles its first program


def _problem(folder: Path) -> str:
    """Make a folder, and return why it cannot be trusted or used; nothing if it can."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
            status = place.lstat()
            if not stat.S_ISDIR(status.st_mode):
                return f"{place} is not a folder"
            if status.st_uid != os.getuid():
                return f"{place} belongs to another user"
            if status.st_mode & OTHERS_MAY_WRITE:
                return f"other users may write to {place}"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} cannot be written"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return ""


@functools.cache
def _kind_of_cpu() -> str:
    """Return a name of this machine's kind of CPU: its architecture, and a digest of what it says of itself."""
    text = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        text = "\n".join(sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names}))
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

"""Check that checkpoints fit on the disk: once at the start of a run, and before every save.

A checkpoint is written whole before an older one is deleted, so a run that keeps two needs room for three.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

GIB = 2**30


def tree_bytes(tree: Any) -> int:
    """Return the bytes of all leaves of a tree of arrays or shapes, over all devices."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def files_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder and below; 0 if there is no such folder."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except OSError:  # it was deleted meanwhile
            continue
    return sum(sizes)


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of the file system that `folder` is on, or will be; None if that is unknown."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems report zeros


def start_problem(folder: Path, size: int, further: int) -> tuple[str, str]:
    """Return (error, warning), each "" if there is none, for a run that is about to start.

    folder: that of the checkpoints. size: bytes of one checkpoint; without room for it the run cannot start. further:
    bytes of everything else that the run will write while it keeps existing files.
    """
    free = free_bytes(folder.absolute())
    if free is None or free >= size + further:
        return "", ""
    if free < size:
        return _too_little(f"the checkpoints of this run ({folder})", folder, size, free), ""
    return "", (
        f"{folder}: the disk has {_size(free)} free, enough for the next checkpoint ({_size(size)}), but the run will "
        f"need about {_size(size + further)} for all checkpoints that it keeps and its exports. Free some space, lower "
        "checkpoint.keep, or choose another output_dir."
    )


def save_problem(path: Path, size: int) -> str:
    """Return why a checkpoint of `size` bytes cannot be written at `path`, or "" if there is room."""
    free = free_bytes(path.parent.absolute())
    return _too_little(str(path), path.parent, size, free) if free is not None and free < size else ""


def _too_little(what: str, folder: Path, size: int, free: int) -> str:
    lines = [
        f"too little disk for {what}: a checkpoint needs {_size(size)}, and the disk has {_size(free)} free. Nothing "
        "was deleted."
    ]
    kept = [(entry, files_bytes(entry)) for entry in _entries(folder)]
    lines += [f"  {_size(used)}  {entry}{_note(entry, folder)}" for entry, used in kept]
    lines.append(
        f"Free at least {_size(size - free)}, or choose another output_dir; then continue with "
        "--config.checkpoint.resume=latest. A run keeps checkpoint.keep checkpoints and writes one more before it "
        "deletes the oldest."
    )
    return "\n  ".join(lines)


def _entries(folder: Path) -> Iterable[Path]:
    """Return what takes space in a run's folder: each checkpoint, and the folders beside `checkpoints`."""
    checkpoints = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    beside = [] if folder.name != "checkpoints" or not folder.parent.is_dir() else folder.parent.iterdir()
    return [*checkpoints, *sorted(entry for entry in beside if entry.is_dir() and entry != folder)]


def _note(entry: Path, folder: Path) -> str:
    newest = max((other.name for other in _entries(folder) if re.fullmatch(r"\d{8}", other.name)), default="")
    if ".aside-" in entry.name:
        return " (set aside by a run that started over; not needed to continue)"
    return " (the newest checkpoint: needed to continue)" if entry.name == newest else ""


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"

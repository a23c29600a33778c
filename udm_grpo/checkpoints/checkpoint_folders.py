"""Find, move and delete complete checkpoints, on local disks and in buckets.

A checkpoint counts once Orbax has committed it, which is marked by a file in it.
"""

import contextlib
import os
import re
from pathlib import Path

import jax
from etils import epath

from udm_grpo.checkpoints.checkpoint_storage import is_remote
from udm_grpo.files.buckets import copy_object, listing
from udm_grpo.files.places import with_home

PathLike = str | os.PathLike[str]

COMMITTED = "commit_success.txt"
"""The file that Orbax writes into a checkpoint last, on local disks and in buckets."""


def is_committed(path: epath.Path) -> bool:
    """Return whether a folder is a complete checkpoint."""
    return (path / COMMITTED).exists()


def committed_steps(folder: epath.Path) -> list[int]:
    """Return the steps of the good checkpoints in a folder, ascending."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name) and is_committed(folder / name))


def committed_best(folder: epath.Path) -> list[tuple[int, epath.Path]]:
    """Return (number, folder) of each good checkpoint in the slot for the best one: more than one only after a kill."""
    slot = folder / "best"
    names = [(re.fullmatch(r"(\d+)-step-\d+", entry.name), entry) for entry in slot.iterdir()] if slot.is_dir() else []
    return [(int(match[1]), entry) for match, entry in names if match and is_committed(entry)]


def drop_superseded(folder: epath.Path) -> None:
    """Delete best checkpoints that neither the run nor a resume from one of its kept checkpoints would use."""
    best = [path for _, path in sorted(committed_best(folder))]
    needed = set(best[-1:])
    for step in committed_steps(folder):
        needed |= set([path for path in best if step_of_best(path) <= step][-1:])
    for path in best:
        if path not in needed:
            remove(path)


def set_best_aside_after(folder: epath.Path, step: int) -> None:
    """Rename best checkpoints of later steps so that they no longer count, replacing ones renamed earlier."""
    for _, path in committed_best(folder):
        if step_of_best(path) > step and jax.process_index() == 0:
            target = path.parent / f"{path.name}.aside"
            remove(target)
            move(path, target)


def step_of_best(path: epath.Path) -> int:
    """Return the step of a best checkpoint, from its name."""
    return int(path.name.rpartition("-")[2])


def clear_leftovers(folder: epath.Path) -> None:
    """Delete the leftovers of killed or failed saves and deletions in the folder."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        ours = re.fullmatch(r"(\d{8}|\d+-step-\d+)(\.orbax-checkpoint-tmp.*)?", entry.name)
        if ours and (ours[2] or not (entry / COMMITTED).exists()):
            remove(entry)


def remove(path: epath.Path) -> None:
    """Delete a checkpoint so that it stops counting at once, even if the deletion is interrupted."""
    if jax.process_index() != 0:
        return
    with contextlib.suppress(OSError):  # a leftover is harmless, and the next save tries again
        (path / COMMITTED).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


def absolute(path: PathLike) -> epath.Path:
    """Return an absolute path; addresses are returned unchanged."""
    text = os.fspath(path)
    return epath.Path(text if is_remote(text) else Path(with_home("the folder", text)).absolute())


def unused_aside(path: epath.Path) -> epath.Path:
    """Return the path that a checkpoint gets when it is set aside: NAME.aside-1, -2, ..., the first unused one."""
    there = {entry.name for entry in path.parent.iterdir()}
    number = 1
    while f"{path.name}.aside-{number}" in there:
        number += 1
    return path.parent / f"{path.name}.aside-{number}"


def move(path: epath.Path, target: epath.Path) -> None:
    """Rename a checkpoint so that it never counts under both names, even if this is interrupted.

    Buckets cannot rename: the objects are copied one by one, the one that commits the checkpoint last.
    """
    if not is_remote(path):
        path.rename(target)
        return
    mark = (path / COMMITTED).read_bytes()
    (path / COMMITTED).unlink()
    for name in listing(str(path)):
        copy_object(f"{path}/{name}", f"{target}/{name}")
    (target / COMMITTED).write_bytes(mark)
    remove(path)

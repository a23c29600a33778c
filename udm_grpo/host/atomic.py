"""Files and folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from udm_grpo.host.places import PlaceError, problem

UNFINISHED = ".unfinished"
"""How the names of files end that are being written, so that a kill leaves nothing that looks like a picture."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a temporary file and put it at `path` once complete: no half-written file is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what kills left of files that were being written, in `folder` and below; no process may write there."""
    for left in folder.rglob(f".*{UNFINISHED}"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path, marker: str) -> Iterator[Path]:
    """Give an empty folder beside `target` to fill; afterwards it takes the target's place.

    If filling it fails (a full disk, a kill), what was at `target` before is untouched; a failure also removes the
    half-filled folder, and a later call what a kill left. Raises FileExistsError if `target` is something else than an
    empty folder or one that holds a file named `marker`, and OSError if nothing can be written there.
    """
    if found := problem("the folder to write", target):
        raise PlaceError(found)
    target = Path(os.path.realpath(target))
    if target.exists() and not _replaceable(target, marker):
        advice = f"it holds no {marker}, so it is not overwritten; choose another folder"
        raise FileExistsError(f"{target} already exists, and {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)  # a kill came between the two renames below
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))

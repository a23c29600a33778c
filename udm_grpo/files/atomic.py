"""Write files and folders atomically: they are complete or absent."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from udm_grpo.files.durable import sync_path, sync_tree
from udm_grpo.files.folder_lock import lock_beside, short_name, unique_name
from udm_grpo.files.places import PlaceError, problem

UNFINISHED = ".unfinished"
"""Suffix of files that are being written, so that a kill leaves nothing that looks like a picture."""
_EXCHANGE, _AT_FDCWD = 2, -100
"""RENAME_EXCHANGE and "relative to the working directory" of Linux."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` create a temporary file and move it to `path`, which never holds a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{short_name(path)}.{unique_name()}{UNFINISHED}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files that kills left in `folder` and below; no process may be writing there."""
    for left in folder.rglob(f".*{UNFINISHED}"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `target` to fill; afterwards it replaces `target`.

    Where the file system can exchange two folders (Linux: ext4, XFS, Btrfs, tmpfs, overlayfs, not NFS), `target` is at
    every moment the old folder or the new one. Elsewhere it is absent for a moment between two renames; after a power
    loss in that moment, the next call restores it.

    If filling the folder fails (a full disk, a kill), the old `target` is untouched; a failure also removes the
    half-filled folder, and a later call removes what a kill left. Raises FileExistsError if `target` is neither an
    empty folder nor one that holds a file named `marker`, FolderLockedError while another process writes it, and
    OSError if nothing can be written there.
    """
    if reason := problem("the folder to write", target):
        raise PlaceError(reason)
    target = Path(os.path.realpath(target))
    if target.exists() and not _replaceable(target, marker):
        raise FileExistsError(_not_ours(target, marker))
    with lock_beside(target, end=False) as lock:
        _clear_leftovers(target)
        fresh, old = _beside(target, ".new"), _beside(target, ".old")
        try:
            fresh.mkdir()
            yield fresh
            sync_tree(fresh)
            lock.check()
            if target.exists() and not _replaceable(target, marker):
                raise FileExistsError(_not_ours(target, marker))
            left = _put(fresh, target, old)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        shutil.rmtree(left, ignore_errors=True)


def _put(fresh: Path, target: Path, old: Path) -> Path:
    """Rename a folder to the target's name; return the path of the previous folder: `fresh` or `old`."""
    left = old
    if target.exists() and exchange(fresh, target):
        left = fresh
    else:
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    sync_path(target.parent)  # before the old folder is removed
    return left


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; return False where the system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _renameat2() -> Any:
    """Return the C library's renameat2, or None if it has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{short_name(target)}.{unique_name()}{ending}")


def _clear_leftovers(target: Path) -> None:
    """Restore the target if a kill came between two renames, and remove what kills left beside it."""
    ours = re.compile(re.escape(f".{short_name(target)}.") + r"([A-Za-z0-9-]*-\d+-[0-9a-f]{12}\.)?(new|old)")
    beside = list(target.parent.iterdir()) if target.parent.is_dir() else []
    left = [path for path in beside if ours.fullmatch(path.name)]
    olds = sorted((path for path in left if path.name.endswith(".old")), key=lambda path: path.stat().st_mtime)
    if olds and not target.exists():
        olds.pop().rename(target)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _replaceable(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def _not_ours(target: Path, marker: str) -> str:
    return f"{target} already exists and holds no {marker}, so it is not overwritten; choose another folder"

"""Writes files and folders to the disk itself, so that a loss of power leaves them."""

import errno
import os
from pathlib import Path

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EROFS, errno.EACCES, errno.EPERM)
"""How file systems refuse to sync something, a folder above all, that they keep safe in their own way or not at all."""


def sync_tree(folder: Path) -> None:
    """Sync a folder, the folders in it and all their files, the deepest first; raises OSError if the disk fails."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync_path(Path(where) / name)
        sync_path(Path(where))


def sync_path(path: Path) -> None:
    """Sync a file, or the names in a folder; one that has disappeared meanwhile is passed over."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(opened)

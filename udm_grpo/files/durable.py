"""Sync files and folders to the disk, so that they survive a loss of power."""

import errno
import os
from pathlib import Path

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of file systems that cannot sync a file or, usually, a folder: they keep it safe in their own way or not."""


def sync_tree(folder: Path) -> None:
    """Sync a folder, the folders in it and all their files, the deepest first; raise OSError if the disk fails."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync_path(Path(where) / name)
        sync_path(Path(where))


def sync_path(path: Path) -> None:
    """Sync a file, or the names in a folder; skip one that has disappeared meanwhile."""
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

"""What Orbax and TensorStore do not handle: special characters in paths, and durability after a power loss.

Orbax searches folders with glob patterns that include the whole path, so `[`, `*` and the like anywhere in it match
nothing or another run's files, and TensorStore rejects paths that are not UTF-8 or look like an address. Such paths are
passed through a symbolic link with a plain name; the files themselves are written where the caller asked.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from etils import epath

from udm_grpo.files.durable import sync_path, sync_tree

_ODD = re.compile(r"[*?\[\]\\\x00-\x1f]|:(/|$)")


def is_remote(path: epath.Path | str) -> bool:
    """Return whether a path is an address in a bucket."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def plain(path: epath.Path) -> epath.Path:
    """Return a path to the same location that Orbax and TensorStore take literally; its parent folder must exist."""
    if is_remote(path) or not _is_odd(os.fspath(path)):
        return path
    if _is_odd(path.name):
        return epath.Path(_link(os.fspath(path)))
    return epath.Path(_link(os.fspath(path.parent))) / path.name


def make_durable(folder: epath.Path) -> None:
    """Sync a folder's files, its subfolders and its own entry to the disk, so that they survive a power loss.

    Does nothing in a bucket, which responds only once an object is stored. Raises OSError if the disk fails.
    """
    if is_remote(folder):
        return
    sync_tree(Path(os.fspath(folder)))
    sync_path(Path(os.fspath(folder.parent)))


def _is_odd(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return _ODD.search(text) is not None


def _link(target: str) -> Path:
    """Return a symbolic link with a plain name to a folder; it exists as long as this process."""
    link = _links() / hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    with contextlib.suppress(FileExistsError):
        link.symlink_to(target, target_is_directory=True)
    return link


@functools.cache
def _links() -> Path:
    """Return this process's folder for links, in the first writable temporary folder with a plain name."""
    for parent in (tempfile.gettempdir(), "/dev/shm", "/tmp", "/var/tmp"):
        if _is_odd(parent) or not os.access(parent, os.W_OK):
            continue
        folder = Path(tempfile.mkdtemp(prefix="udm-grpo-paths-", dir=parent))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder
    raise OSError(
        "checkpoints in a folder with one of *?[]\\ in its path need a temporary folder for a link; set TMPDIR to a "
        "writable folder without such characters, or choose another output folder."
    )

"""Size and SHA-256 of every file of a checkpoint: written when it is saved, compared before it is restored.

Orbax detects a missing or truncated file, but not numbers that a failing disk or a bad copy has changed, because arrays
are stored without checksums. With this list every kind of damage is detected in the same way and by all processes,
since each compares a share of the files before any of them restores. Buckets have their own checksums; checkpoints in
buckets have no list, nor do those of earlier versions: for these only what Orbax detects is reported.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath

from udm_grpo.checkpoints.checkpoint_folders import COMMITTED
from udm_grpo.checkpoints.checkpoint_storage import is_remote
from udm_grpo.files.atomic import replace_file
from udm_grpo.multihost import hosts

CONTENTS = "contents.json"
READERS = 4
"""Files that are read in parallel; hashing releases the GIL."""


def write_contents(folder: epath.Path) -> None:
    """Write the list of a checkpoint's files into it; does nothing in a bucket. Raises OSError if the disk fails."""
    if is_remote(folder):
        return
    root = Path(os.fspath(folder))
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(READERS) as pool:
        files = dict(zip(names, pool.map(lambda name: _form(root / name), names), strict=True))
    # As a whole or not at all: half a list would make a complete checkpoint look damaged.
    replace_file(root / CONTENTS, partial(Path.write_text, data=json.dumps({"files": files}, indent=0)))


def damaged_files(folder: epath.Path) -> list[str]:
    """Return a line for each file of a checkpoint that differs from what was saved; none if it has no list.

    All processes must call this, and all get the same lines.
    """
    if is_remote(folder) or not hosts.from_primary((folder / CONTENTS).exists):
        return []
    return [line for lines in hosts.gather(_own_share(Path(os.fspath(folder)))) for line in lines]


def _own_share(root: Path) -> list[str]:
    try:
        files: Mapping[str, Any] = json.loads((root / CONTENTS).read_text())["files"]
        names = sorted(name for name in files if name != COMMITTED)[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(READERS) as pool:
            return list(filter(None, pool.map(lambda name: _change(root / name, name, files[name]), names)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CONTENTS} cannot be read ({type(error).__name__}: {error})"]


def _change(path: Path, name: str, saved: Mapping[str, Any]) -> str:
    """Return how a file differs from what was saved; "" if it does not."""
    try:
        size = path.stat().st_size
        if size != saved["bytes"]:
            return f"{name} has {size} bytes instead of {saved['bytes']}"
        return "" if _form(path) == saved else f"{name} has other content than was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _form(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

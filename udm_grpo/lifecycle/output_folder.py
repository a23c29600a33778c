"""The folder of a run: looked at before anything is loaded, and written only once everything has agreed to the start.

A start that is refused (settings that do not fit a checkpoint, a scorer that cannot load, damaged weights) leaves the
folder as it was, so that the files in it continue describing the run that made them.
"""

import contextlib
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.files.bucket_lock import lock_output
from udm_grpo.files.buckets import Mirror, exists, staging
from udm_grpo.files.folder_lock import WaitStoppedError
from udm_grpo.files.places import is_bucket
from udm_grpo.files.set_aside import RESULTS, RUN_FILES, set_aside
from udm_grpo.lifecycle.interruption import Interruption
from udm_grpo.multihost import hosts

SEEN_WITHIN_S = 20.0
"""How long a file of process 0 may take to show on the other hosts."""


def output_path(config: RunConfig) -> Path:
    """Return the run's folder; for a run in a bucket, the local folder that stands for it in this process."""
    if is_bucket(config.output_dir):
        return staging(config.output_dir, jax.process_index())
    return Path(config.output_dir)


def checkpoints_place(config: RunConfig) -> str:
    """Return the path or the address of the folder of the run's checkpoints."""
    if is_bucket(config.output_dir):
        return f"{config.output_dir.rstrip('/')}/checkpoints"
    return str(output_path(config) / "checkpoints")


def check_output(config: RunConfig) -> None:
    """Raise ConfigError or PlaceError if output_dir cannot be written, as far as can be told without writing there."""
    if is_bucket(config.output_dir):
        exists(config.output_dir)
        return
    output = output_path(config).absolute()
    nearest = next(folder for folder in (output, *output.parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir is {output}, but {nearest} is a file; name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir is {output}, but nothing can be written in {nearest}; name another folder.")


def check_inputs_stay(config: RunConfig, output: Path) -> None:
    """Raise ConfigError for a model or prompts inside of what the run writes, and so replaces or sets aside."""
    if is_bucket(config.output_dir):
        return
    named = {"model.path": config.model.path, "model.transformer": config.model.transformer}
    named |= {"prompts.train": config.prompts.train, "prompts.heldout": config.prompts.heldout}
    written = [Path(os.path.realpath(output / name)) for name in RUN_FILES]
    lines = [
        f"{field} is {text}, which is among what this run writes into output_dir; copy it elsewhere, or name another "
        "output_dir."
        for field, text in named.items()
        if text and any(Path(os.path.realpath(text)).is_relative_to(place) for place in written)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def lock_for_all(folder: str) -> contextlib.AbstractContextManager[Any]:
    """Hold the lock of an output folder, in process 0 for all of them; see `folder_lock.locked`."""
    return lock_output(folder) if hosts.is_primary() else contextlib.nullcontext()


def lock_for_run(folder: str, asked: Interruption, stack: contextlib.ExitStack) -> None:
    """`lock_for_all` until `stack` closes; raises StopRequestedError in all processes if one is asked to stop."""
    if hosts.is_primary():
        with contextlib.suppress(WaitStoppedError):  # the check below tells all of them
            stack.enter_context(lock_output(folder, lambda: asked.requested))
    asked.check()


def claim_output(config: RunConfig, stack: contextlib.ExitStack) -> Mirror | None:
    """Make the run's folder, which is only checked for being shared; returns what mirrors it to a bucket, in process 0.

    Raises ConfigError if a process does not see in the folder what process 0 writes; then it is as it was.
    """
    output = output_path(config)
    if is_bucket(config.output_dir):
        mirror = stack.enter_context(Mirror(config.output_dir)) if hosts.is_primary() else None
        output.mkdir(parents=True, exist_ok=True)
        return mirror
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    blind = _blind(output) if jax.process_count() > 1 else []
    if blind:
        for folder in missing:
            with contextlib.suppress(OSError):  # another process is in it
                folder.rmdir()
        raise ConfigError(
            f"output_dir {output} is not the same folder for all: process(es) {', '.join(map(str, blind))} do not see "
            "there what process 0 writes; name a folder that all hosts share."
        )
    return None


def set_aside_older(config: RunConfig, output: Path, own_step: int | None) -> None:
    """Move what an older run left in the folder to its `older`, and say so; for process 0.

    own_step: where the run resumes from if the folder is its own; then only the results of an earlier end are moved,
    unless the run is at that end still.
    """
    address = config.output_dir.rstrip("/") if is_bucket(config.output_dir) else ""
    if own_step is None:
        moved = set_aside(output, address)
    elif _iterations(output / "summary.json") in (None, own_step) and own_step >= config.iterations:
        return
    else:
        moved = set_aside(output, address, RESULTS)
    if moved:
        print(f"what an older run left in {config.output_dir} is now in {moved}", file=sys.stderr)


def _iterations(summary: Path) -> int | None:
    """Return how many iterations a summary is of; None if there is none, or a damaged one."""
    try:
        return dict(json.loads(summary.read_bytes())).get("iterations")
    except (OSError, ValueError, TypeError):
        return None


def _blind(output: Path) -> list[int]:
    """Return the processes that do not see a file that process 0 makes in the folder for a moment."""
    mark = output / hosts.from_primary(lambda: f".seen-{uuid.uuid4().hex}")
    if hosts.is_primary():
        mark.touch()
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [process for process, seen in enumerate(hosts.gather(mark.exists())) if not seen]
    if hosts.is_primary():
        mark.unlink(missing_ok=True)
    return blind

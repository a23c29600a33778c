"""The output folder of a run: checked before anything is loaded, and written only once the start has succeeded.

A start that is refused (settings that do not fit a checkpoint, a scorer that cannot load, damaged weights) leaves the
folder as it was, so that the files in it still describe the run that wrote them.
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
"""Seconds that a file written by process 0 may take to become visible on the other hosts."""


def output_path(config: RunConfig) -> Path:
    """Return the run's folder; for a run in a bucket, this process's local staging folder."""
    if is_bucket(config.output_dir):
        return staging(config.output_dir, jax.process_index())
    return Path(config.output_dir)


def checkpoints_place(config: RunConfig) -> str:
    """Return the path or address of the run's folder of checkpoints."""
    if is_bucket(config.output_dir):
        return f"{config.output_dir.rstrip('/')}/checkpoints"
    return str(output_path(config) / "checkpoints")


def check_output(config: RunConfig) -> None:
    """Raise ConfigError or PlaceError if output_dir is not writable, as far as can be told without writing to it."""
    if is_bucket(config.output_dir):
        exists(config.output_dir)
        return
    output = output_path(config).absolute()
    nearest = next(folder for folder in (output, *output.parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir is {output}, but {nearest} is a file; name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir is {output}, but {nearest} is not writable; name another folder.")


def check_inputs_stay(config: RunConfig, output: Path) -> None:
    """Raise ConfigError if the model or prompts are among the files that the run would replace or set aside."""
    if is_bucket(config.output_dir):
        return
    named = {"model.path": config.model.path, "model.transformer": config.model.transformer}
    named |= {"prompts.train": config.prompts.train, "prompts.heldout": config.prompts.heldout}
    written = [Path(os.path.realpath(output / name)) for name in RUN_FILES]
    lines = [
        f"{field} is {text}, which is among the files that this run writes into output_dir; copy it elsewhere, or "
        "name another output_dir."
        for field, text in named.items()
        if text and any(Path(os.path.realpath(text)).is_relative_to(place) for place in written)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def lock_for_all(folder: str) -> contextlib.AbstractContextManager[Any]:
    """Hold the lock of an output folder, in process 0 on behalf of all processes; see `folder_lock.locked`."""
    return lock_output(folder) if hosts.is_primary() else contextlib.nullcontext()


def lock_for_run(folder: str, asked: Interruption, stack: contextlib.ExitStack) -> None:
    """Hold `lock_for_all` until `stack` closes; raises StopRequestedError in all processes if one is asked to stop."""
    if hosts.is_primary():
        with contextlib.suppress(WaitStoppedError):  # the check below raises in all processes
            stack.enter_context(lock_output(folder, lambda: asked.requested))
    asked.check()


def claim_output(config: RunConfig, stack: contextlib.ExitStack) -> Mirror | None:
    """Create the run's folder and check that all processes share it; return its bucket mirror in process 0, if any.

    Raises ConfigError, leaving no new folders, if a process does not see what process 0 writes there.
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
            "what process 0 writes there; name a folder that all hosts share."
        )
    return None


def set_aside_older(config: RunConfig, output: Path, own_step: int | None) -> None:
    """Move the files of an older run in this folder into its subfolder `older`, and say so; for process 0 only.

    own_step: the step that the run resumes from if the folder is its own; then only the final results of an earlier
    end are moved, unless the run is still at that end.
    """
    address = config.output_dir.rstrip("/") if is_bucket(config.output_dir) else ""
    if own_step is None:
        moved = set_aside(output, address)
    elif _iterations(output / "summary.json") in (None, own_step) and own_step >= config.iterations:
        return
    else:
        moved = set_aside(output, address, RESULTS)
    if moved:
        print(f"moved the files of an older run in {config.output_dir} to {moved}", file=sys.stderr)


def _iterations(summary: Path) -> int | None:
    """Return the iterations that a summary records; None if it is missing or damaged."""
    try:
        return dict(json.loads(summary.read_bytes())).get("iterations")
    except (OSError, ValueError, TypeError):
        return None


def _blind(output: Path) -> list[int]:
    """Return the processes that do not see a temporary file that process 0 creates in the folder."""
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

"""The identity of a run: its id, which is in every file that it writes, and the checkpoint that it resumes from.

A fresh start gets a new id. A run that resumes from a checkpoint in its own output_dir keeps its id; one that resumes
into another folder is a branch with an id of its own.
"""

import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from udm_grpo.checkpoints.checkpoint import Checkpoints, check_same_run, read_meta, resolve_resume
from udm_grpo.config import RunConfig
from udm_grpo.files.places import is_bucket
from udm_grpo.lifecycle.fingerprint import comparable
from udm_grpo.multihost import hosts


@dataclass(frozen=True)
class Identity:
    """A run, and where it comes from."""

    id: str
    """Is in every file that the run writes, except in exports, which are identical for identical weights."""
    fingerprint: Mapping[str, Any]
    """What determines the run's numbers; the same wherever it continues."""
    resume: str | None = None
    """The checkpoint that it resumes from; None for a fresh start."""
    here: bool = False
    """Whether that checkpoint is in its own output_dir, whose other files then belong to the run, too."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of that checkpoint."""

    @property
    def origin(self) -> dict[str, Any] | None:
        """The id and the checkpoint of the run that a branch comes from; None for any other run."""
        if self.resume is None or self.here:
            return None
        return {"run": self.meta.get("run"), "checkpoint": self.resume}

    def saved_with(self, **more: Any) -> dict[str, Any]:
        """Return the metadata of a checkpoint of this run."""
        return {"run": self.id, "fingerprint": self.fingerprint, **more}


def new_id() -> str:
    """Return a unique id; ids sort by start time."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


def check_continues(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a checkpoint, perhaps of an earlier version, is of the run with this fingerprint."""
    if "fingerprint" not in meta:
        check_same_run(meta, fingerprint)
    saved, now = comparable(meta["fingerprint"], fingerprint)
    check_same_run({"fingerprint": saved}, now)


def identify(config: RunConfig, checkpoints: Checkpoints, fingerprint: Mapping[str, Any]) -> Identity:
    """Find the checkpoint to resume from; raises CheckpointError if it is missing, damaged or of another run."""
    checkpoint = hosts.from_primary(lambda: _resume(config, checkpoints))
    if checkpoint is None:
        return Identity(hosts.from_primary(new_id), fingerprint)
    meta = read_meta(checkpoint)
    check_continues(meta, fingerprint)
    here = _same_place(folder_of(checkpoint), str(checkpoints.folder))
    known = meta.get("run") if here else None  # checkpoints of earlier versions have none
    return Identity(known or hosts.from_primary(new_id), fingerprint, checkpoint, here, meta)


def folder_of(checkpoint: str) -> str:
    """Return the folder of checkpoints that a checkpoint is in."""
    return checkpoint.rstrip("/").rpartition("/")[0]


def _resume(config: RunConfig, checkpoints: Checkpoints) -> str | None:
    path = resolve_resume(config.checkpoint.resume, checkpoints.folder)
    return None if path is None else str(path)


def _same_place(one: str, other: str) -> bool:
    if is_bucket(one) or is_bucket(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)

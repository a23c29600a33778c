"""Which run this is: its id, which every file that it writes bears, and the checkpoint that it resumes from.

A fresh start makes a new id. A run that resumes from a checkpoint of its own output_dir keeps its id; one that resumes
in another folder is a branch with an id of its own.
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
    """In every file that the run writes, except in exports, which are the same for the same weights."""
    fingerprint: Mapping[str, Any]
    """What decides the run's numbers; the same wherever it continues."""
    resume: str | None = None
    """The checkpoint that it resumes from; None: it begins anew."""
    here: bool = False
    """Whether that is a checkpoint of its own output_dir, whose other files are then its own, too."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What that checkpoint says of itself."""

    @property
    def origin(self) -> dict[str, Any] | None:
        """What a branch says of the run that it comes from: its id and the checkpoint; None for any other run."""
        if self.resume is None or self.here:
            return None
        return {"run": self.meta.get("run"), "checkpoint": self.resume}

    def saved_with(self, **more: Any) -> dict[str, Any]:
        """Return the metadata of a checkpoint of this run."""
        return {"run": self.id, "fingerprint": self.fingerprint, **more}


def new_id() -> str:
    """Return an id that no other run has; ids sort by the time of their start."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:8]}"


def check_continues(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a checkpoint's run, perhaps of an earlier version, is the one of `fingerprint`."""
    if "fingerprint" not in meta:
        check_same_run(meta, fingerprint)
    saved, now = comparable(meta["fingerprint"], fingerprint)
    check_same_run({"fingerprint": saved}, now)


def identify(config: RunConfig, checkpoints: Checkpoints, fingerprint: Mapping[str, Any]) -> Identity:
    """Find what the run resumes from; raises CheckpointError if that is missing, damaged or of another run."""
    found = hosts.from_primary(lambda: _resume(config, checkpoints))
    if found is None:
        return Identity(hosts.from_primary(new_id), fingerprint)
    meta = read_meta(found)
    check_continues(meta, fingerprint)
    here = _same_place(folder_of(found), str(checkpoints.folder))
    known = meta.get("run") if here else None  # checkpoints of earlier versions have none
    return Identity(known or hosts.from_primary(new_id), fingerprint, found, here, meta)


def folder_of(checkpoint: str) -> str:
    """Return the folder of checkpoints that a checkpoint is in."""
    return checkpoint.rstrip("/").rpartition("/")[0]


def _resume(config: RunConfig, checkpoints: Checkpoints) -> str | None:
    found = resolve_resume(config.checkpoint.resume, checkpoints.folder)
    return None if found is None else str(found)


def _same_place(one: str, other: str) -> bool:
    if is_bucket(one) or is_bucket(other):
        return one.rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)

"""Checkpoints on Orbax: save, restore onto any devices, and find the point from which a run resumes.

    checkpoints/00000040/           one folder per saved step, eight digits
    checkpoints/best/1-step-40/     the slot for the best weights, which `keep` does not count

Guarantees:
* A checkpoint counts only once Orbax has committed it. Leftovers of a killed or failed save are never listed, and the
  next save removes them. Older checkpoints are deleted only after the new one is committed, synced to the disk and
  reopened: if it cannot be read back, an error is raised and nothing is deleted.
* A state is stored as a flat {"params/layers/q": array} of its leaves. `restore` returns it in the structure of the
  abstract state, bit for bit, dtypes included, on the shardings given there: no flax or optax type is stored.
* `meta` is any JSON dictionary. What identifies a run goes under "fingerprint" (see `check_same_run`).

Orbax writes and reads the arrays. Its CheckpointManager and preservation policies are not used, since they select by
step and metric alone: here a checkpoint is deleted only after a newer one was read back, the best weights have a slot
that a run resumed from an earlier step does not inherit, and files of another run are set aside, never deleted.

`begin` copies the state and writes it while the caller continues; `finish` waits for it, and `save` does both. With
several processes, all of them must call these and `restore`, and all must see the same folder.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from udm_grpo.checkpoints.checkpoint_contents import write_contents
from udm_grpo.checkpoints.checkpoint_folders import (
    PathLike,
    absolute,
    clear_leftovers,
    committed_best,
    committed_steps,
    drop_superseded,
    move,
    remove,
    set_best_aside_after,
    unused_aside,
)
from udm_grpo.checkpoints.checkpoint_leaves import State, differences, sample_of, savable_leaves
from udm_grpo.checkpoints.checkpoint_reading import (
    FORMAT,
    CheckpointError,
    DamagedError,
    as_json,
    check_same_run,
    first_line,
    orbax_context,
    read_header,
    read_meta,
    reading,
    resolve_resume,
    restore,
)
from udm_grpo.checkpoints.checkpoint_storage import is_remote, make_durable, plain
from udm_grpo.files.disk_space import save_problem
from udm_grpo.files.finite import named, nonfinite

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "check_same_run", "read_meta", "resolve_resume", "restore"]


@dataclass(frozen=True)
class _Pending:
    """A save that has begun."""

    path: epath.Path
    leaves: dict[str, jax.ShapeDtypeStruct]
    """The saved leaves, by name."""
    sample: dict[str, np.ndarray]
    """One small array, to be compared with what is read back."""
    response: ocp.AsyncResponse[None]
    after: Callable[[], None]
    """Called once the checkpoint is good."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them in `folder`, and the best one in `folder`/best.

    `folder`: a local path or a bucket (gs://...). Nothing is created or deleted before the first save.
    """

    def __init__(self, folder: PathLike, keep: int):
        if keep < 1:
            raise ValueError(f"the number of checkpoints to keep must be at least 1, found {keep}")
        self.folder, self.keep = absolute(folder), keep
        self._written: set[int] = set()
        self._pending: _Pending | None = None
        self._best_number = 0

    def steps(self) -> list[int]:
        """Return the steps of all good checkpoints, oldest first."""
        return committed_steps(self.folder)

    def latest(self) -> int | None:
        """Return the newest good step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> epath.Path | None:
        """Return the folder of the checkpoint saved last by `save_best`, or None."""
        return max(committed_best(self.folder), default=(0, None))[1]

    def path(self, step: int) -> epath.Path:
        """Return the folder of this step's checkpoint, which need not exist."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Save the state (`begin`, then `finish`); return the checkpoint's folder."""
        self.begin(step, state, meta)
        self.finish()
        return self.path(step)

    def begin(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Start saving the state as this step's checkpoint; once it is good, all but the newest `keep` are deleted.

        Returns when the state has been copied, so its arrays may then be donated. Waits first for a save already in
        progress. Does nothing if this object has saved the step before: a step of a run has only one state.

        Raises CheckpointError for leaves with non-finite numbers, when there is too little disk space or saving fails
        in another way (earlier checkpoints stay as they are), and when an earlier run's checkpoint of this step exists;
        TypeError for leaves that are not arrays.
        """
        self.finish()
        path = self.path(step)
        if step in self._written:
            return
        if jax.process_index() == 0 and step in self.steps():
            advice = "resume from it, call set_aside_after, or choose another folder"
            raise CheckpointError(f"{path} already exists, from an earlier run; {advice}")

        def keep_newest() -> None:
            self._written.add(step)
            for old in self.steps()[: -self.keep]:
                remove(self.path(old))
            drop_superseded(self.folder)

        self._begin(path, step, state, meta, keep_newest)

    def save_best(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Save the state as the best one (`begin_best`, then `finish`); return the checkpoint's folder."""
        path = self.begin_best(step, state, meta)
        self.finish()
        return path

    def begin_best(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Start saving the state in the slot for the best one.

        Once it is good, earlier best ones are deleted, except those needed to resume from a kept checkpoint: for each,
        the newest best one of its step or before.
        """
        self.finish()
        before = committed_best(self.folder)
        self._best_number = max(self._best_number, max(before, default=(0, None))[0]) + 1
        path = self.folder / "best" / f"{self._best_number}-step-{step}"

        self._begin(path, step, state, meta, lambda: drop_superseded(self.folder))
        return path

    def finish(self) -> None:
        """Wait until the save in progress is complete and verified; raises CheckpointError if that fails."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._failing(pending.path, _size(pending.leaves)):
            pending.response.result()
            if jax.process_index() == 0:
                write_contents(pending.path)
                make_durable(pending.path)
        try:
            _read_back(pending)
        except CheckpointError as error:
            kept = "It does not count as saved, and no older checkpoint was deleted"
            raise CheckpointError(f"{pending.path} was written but cannot be read back: {error}\n  {kept}.") from error
        pending.after()

    def restore(self, path_or_step: PathLike | int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """Return (state, meta) of a checkpoint, by its step here or by its folder anywhere; see `restore`."""
        path = self.path(path_or_step) if isinstance(path_or_step, int) else path_or_step
        return restore(path, abstract_state)

    def set_aside_after(self, step: int) -> list[epath.Path]:
        """Rename all checkpoints newer than `step` so that they no longer count; return their new folders.

        For a run that resumes from an earlier point (or, with step -1, starts over) in a folder with later checkpoints.
        Best ones of later steps are renamed, too.
        """
        set_best_aside_after(self.folder, step)
        moved = []
        for later in [other for other in self.steps() if other > step]:
            moved.append(unused_aside(self.path(later)))
            if jax.process_index() == 0:
                move(self.path(later), moved[-1])
        return moved

    def _begin(
        self, path: epath.Path, step: int, state: State, meta: Mapping[str, Any], after: Callable[[], None]
    ) -> None:
        leaves = savable_leaves(state)
        if bad := nonfinite(leaves):
            advice = "Nothing was written, and earlier checkpoints stay as they are"
            raise CheckpointError(f"{path} is not saved: NaN or infinite numbers in {named(bad)}. {advice}.")
        header = {"format": FORMAT, "step": step, "meta": as_json(meta)}
        forms = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        size, sample = _size(forms), sample_of(leaves)
        clear_leftovers(path.parent)
        # Only process 0 checks: the others might do so while it is already writing.
        problem = "" if jax.process_index() or is_remote(path) else save_problem(Path(path), size)
        if problem:
            raise CheckpointError(problem)
        with self._failing(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            with orbax_context():
                response = ocp.save_async(plain(path), leaves, custom_metadata=header)
        self._pending = _Pending(path, forms, sample, response, after)

    @contextlib.contextmanager
    def _failing(self, path: epath.Path, size: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            clear_leftovers(path.parent)
            raise CheckpointError(self._why_not_saved(path, size, error)) from error

    def _why_not_saved(self, path: epath.Path, size: int, error: Exception) -> str:
        text = f"saving {path} failed: {first_line(error)}\n  It needs {size / 2**20:,.1f} MiB"
        with contextlib.suppress(OSError):
            text += f"; the disk has {shutil.disk_usage(self.folder).free / 2**20:,.1f} MiB free"
        latest = max((step for step in self.steps() if self.path(step) != path), default=None)
        kept = "There is no checkpoint yet" if latest is None else f"The last good checkpoint is {self.path(latest)}"
        return f"{text}. {kept}; nothing was deleted.\n  If the disk is full, free some space; then use resume=latest."


def _read_back(saved: _Pending) -> None:
    """Raise CheckpointError unless a checkpoint has the shapes and dtypes that were saved, and the sample's values.

    With several processes no array is read, since all would have to take part when one of them may have failed.
    """
    stored, _ = read_header(saved.path)
    lines = differences(stored, saved.leaves, partial=False)
    if not lines and saved.sample and jax.process_count() == 1:
        with reading(saved.path, partial=True):
            loaded = ocp.load(plain(saved.path), {name: np.empty_like(value) for name, value in saved.sample.items()})
        lines = [name for name, value in saved.sample.items() if loaded[name].tobytes() != value.tobytes()]
        lines = [f"{name} has other values" for name in lines]
    if lines:
        raise DamagedError(f"{saved.path} is damaged: {'; '.join(lines)}")


def _size(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())

"""Checkpoints on Orbax: save, restore onto any devices, and find the point from which a run goes on.

    checkpoints/00000040/           one folder per saved step, eight digits
    checkpoints/best/1-step-40/     a slot of its own, which `keep` does not count

What a caller may rely on:
* A checkpoint counts only once Orbax has committed it. What a killed or failed save leaves behind is never listed, and
  the next save clears it away. Older checkpoints go only after the new one is committed.
* A state is stored as a flat {"params/layers/q": array} of its leaves and comes back in the structure of the abstract
  state given to `restore`, bit for bit, dtypes included, on the shardings given there: no flax or optax type is stored.
* `meta` is any JSON dictionary. What makes two runs the same run goes under "fingerprint" (see `check_same_run`).

`begin` copies the state and writes it while the caller goes on; `finish` waits for it, and `save` is both. With several
processes all of them call these and `restore` alike, and all see the same folder.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from udm_grpo.host.checkpoint_folders import (
    COMMITTED,
    PathLike,
    absolute,
    clear_leftovers,
    committed_best,
    committed_steps,
    drop_superseded,
    is_committed,
    move,
    newest_of,
    remove,
    set_best_aside_after,
)
from udm_grpo.host.checkpoint_leaves import State, abstract_leaves, by_name, differences, savable_leaves
from udm_grpo.host.disk_space import save_problem
from udm_grpo.host.finite import named, nonfinite

FORMAT = 1  # of what is inside a checkpoint; goes up when old ones can no longer be read


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read, or belongs to another run; the message says what to do."""


@dataclass(frozen=True)
class _Pending:
    """A save that has begun."""

    path: epath.Path
    bytes: int
    response: ocp.AsyncResponse[None]
    after: Callable[[], None]
    """What to do once it is good."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them in `folder`, and the best one in `folder`/best.

    `folder`: a local path or a bucket (gs://...). Nothing is created or deleted before the first save.
    """

    def __init__(self, folder: PathLike, keep: int):
        if keep < 1:
            raise ValueError(f"checkpoints to keep must be at least 1, found {keep}")
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
        """Return the folder of this step's checkpoint, whether it exists or not."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """`begin` to save, and `finish`; return the checkpoint's folder."""
        self.begin(step, state, meta)
        self.finish()
        return self.path(step)

    def begin(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Begin to save the state as this step's checkpoint; once it is good, all but the newest `keep` are deleted.

        Returns when the state has been copied: what becomes of its arrays then does not matter. Waits for a save that
        has begun before. Saving a step again that this object has saved does nothing: a step of a run has one state.

        Raises CheckpointError for leaves whose numbers are not finite, when there is too little disk or saving fails in
        another way (earlier checkpoints stay as they are), and when an earlier run's checkpoint of this step exists;
        TypeError for leaves that are not arrays.
        """
        self.finish()
        path = self.path(step)
        if step in self._written:
            return
        if jax.process_index() == 0 and step in self.steps():
            advice = "resume from it, call set_aside_after, or choose another folder"
            raise CheckpointError(f"{path} exists already, from an earlier run; {advice}")

        def keepnewest_of() -> None:
            self._written.add(step)
            for old in self.steps()[: -self.keep]:
                remove(self.path(old))
            drop_superseded(self.folder)

        self._begin(path, step, state, meta, keepnewest_of)

    def save_best(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """`begin_best`, and `finish`; return the checkpoint's folder."""
        path = self.begin_best(step, state, meta)
        self.finish()
        return path

    def begin_best(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Begin to save the state in the slot for the best one.

        Once it is good, those before are deleted, except what a run would need that goes on from a kept checkpoint: the
        newest of its step or before.
        """
        self.finish()
        before = committed_best(self.folder)
        self._best_number = max(self._best_number, max(before, default=(0, None))[0]) + 1
        path = self.folder / "best" / f"{self._best_number}-step-{step}"

        self._begin(path, step, state, meta, lambda: drop_superseded(self.folder))
        return path

    def finish(self) -> None:
        """Wait until what has begun is good; raises CheckpointError if it cannot be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._failing(pending.path, pending.bytes):
            pending.response.result()
        pending.after()

    def restore(self, path_or_step: PathLike | int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """Return (state, meta) of one of these checkpoints by its step, or of any by its folder; see `restore`."""
        path = self.path(path_or_step) if isinstance(path_or_step, int) else path_or_step
        return restore(path, abstract_state)

    def set_aside_after(self, step: int) -> list[epath.Path]:
        """Rename all checkpoints newer than `step` so that they no longer count; return their new folders.

        For a run that goes on from an earlier point (or, with step -1, begins anew) in a folder that holds later ones.
        Best ones of later steps are renamed, too.
        """
        set_best_aside_after(self.folder, step)
        moved = []
        for later in [other for other in self.steps() if other > step]:
            number = 1 + len(list(self.folder.glob(f"{later:08d}.aside-*")))
            moved.append(self.folder / f"{later:08d}.aside-{number}")
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
        header = {"format": FORMAT, "step": step, "meta": _as_json(meta)}
        size = sum(leaf.nbytes for leaf in leaves.values())
        clear_leftovers(path.parent)
        # Process 0 alone asks: the others might do so while it writes already.
        problem = "" if jax.process_index() or "://" in str(path) else save_problem(Path(path), size)
        if problem:
            raise CheckpointError(problem)
        with self._failing(path, size):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _orbax():
                response = ocp.save_async(path, leaves, custom_metadata=header)
        self._pending = _Pending(path, size, response, after)

    @contextlib.contextmanager
    def _failing(self, path: epath.Path, size: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            clear_leftovers(path.parent)
            raise CheckpointError(self._why_not_saved(path, size, error)) from error

    def _why_not_saved(self, path: epath.Path, size: int, error: Exception) -> str:
        text = f"saving {path} failed: {_first_line(error)}\n  It needs {size / 2**20:,.1f} MiB"
        with contextlib.suppress(OSError):
            text += f"; the disk has {shutil.disk_usage(self.folder).free / 2**20:,.1f} MiB free"
        latest = self.latest()
        kept = "There is no checkpoint yet" if latest is None else f"The last good checkpoint is {self.path(latest)}"
        return f"{text}. {kept}; nothing was deleted.\n  Make room if the disk is full, then go on with resume=latest."


def restore(path: PathLike, abstract_state: State, partial: bool = False) -> tuple[State, dict[str, Any]]:
    """Return (state, meta) of the checkpoint in this folder, in the structure and on the shardings of abstract_state.

    Leaves of abstract_state: jax.ShapeDtypeStruct with a sharding (without one: the first device) or a jax.Array give
    a jax.Array; a NumPy array or scalar gives the same. With `partial`, what else is in the checkpoint is left unread.

    Raises CheckpointError if there is no good checkpoint, if it is another model's (which names, shapes and dtypes
    differ: the first few of each kind and how many), if its files are damaged, or if numbers in it are not finite.
    """
    path = absolute(path)
    saved, meta = _read_header(path)
    wanted = abstract_leaves(abstract_state)
    found = differences(saved, wanted, partial)
    if found:
        advice = "Give the configuration it was made with, or resume=none to begin anew."
        raise CheckpointError("\n  ".join([f"{path} is a checkpoint of another model:", *found, advice]))
    with _reading(path, partial):
        loaded = ocp.load(path, wanted)
    if bad := nonfinite(loaded):
        raise CheckpointError(f"{path}: NaN or infinite numbers in {named(bad)}. Give an earlier checkpoint.")
    scalars = [isinstance(leaf, np.generic) for leaf in jax.tree.leaves(abstract_state)]
    leaves = [loaded[name][()] if scalar else loaded[name] for name, scalar in zip(wanted, scalars, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta


def read_meta(path: PathLike) -> dict[str, Any]:
    """Return the meta dictionary of the checkpoint in this folder; raise CheckpointError if there is none."""
    return _read_header(absolute(path))[1]


def resolve_resume(resume: str, folder: PathLike) -> epath.Path | None:
    """Return the checkpoint to go on from, or None to begin anew.

    resume: "none"; "latest", the newest good one in `folder`, None if there is none yet; or a path, to a checkpoint or
    to a folder of checkpoints (a run's folder too), whose newest is taken. CheckpointError if the path has none.
    """
    if resume == "none":
        return None
    if resume == "latest":
        return newest_of(absolute(folder))
    path = absolute(resume)
    if not path.exists():
        raise CheckpointError(f"resume={resume}: no such folder. Give latest, none, or a checkpoint's folder")
    if is_committed(path):
        return path
    newest = newest_of(path) or newest_of(path / "checkpoints")
    if newest is None:
        advice = f"A checkpoint is a folder such as {path / '00000040'} with {COMMITTED} in it"
        raise CheckpointError(f"resume={resume}: neither a complete checkpoint nor a folder of some. {advice}")
    return newest


def check_same_run(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing every field in which meta["fingerprint"] differs from this run's fingerprint."""
    if "fingerprint" not in meta:
        raise CheckpointError("the checkpoint's meta has no fingerprint, so it cannot be told which run it belongs to")
    sides = (_as_json(meta["fingerprint"]), _as_json(fingerprint))
    saved, now = (by_name(side, separator=".", is_leaf=lambda leaf: leaf is None) for side in sides)
    lines = []
    for name in sorted(saved.keys() | now.keys()):
        was, is_now = (json.dumps(side[name]) if name in side else "absent" for side in (saved, now))
        if was != is_now:
            lines.append(f"{name}: saved {was}, now {is_now}")
    if lines:
        advice = "Set these fields back, or begin anew with resume=none in another output_dir."
        raise CheckpointError("\n  ".join(["the checkpoint is of a run with another configuration:", *lines, advice]))


def _read_header(path: epath.Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return what is known of each saved leaf (shape, dtype) by name, and the meta dictionary."""
    if not is_committed(path):
        raise CheckpointError(f"{path} is not a complete checkpoint" + ("" if path.exists() else " (no such folder)"))
    with _reading(path):
        header = ocp.metadata(path)
        if not header.metadata:
            raise ValueError("the arrays cannot be read")
    ours = header.custom_metadata
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        raise CheckpointError(f"{path} is an Orbax checkpoint, but not one of this program in format {FORMAT}")
    return header.metadata, ours["meta"]


def _orbax(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False  # otherwise a failed save leaves threads waiting
    context.array.saving.use_compression = False  # weights hardly shrink (8 %), and saving takes three times as long
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def _reading(path: epath.Path, partial: bool = False) -> Iterator[None]:
    try:
        with _orbax(partial):
            yield
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}\n  Resume from another checkpoint.") from error


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta as it will be read back (tuples as lists); raise CheckpointError if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta must be plain JSON (numbers other than NaN, texts, lists): {error}") from None


def _first_line(error: Exception) -> str:
    text = str(error).split(" [tensorstore_spec=")[0]  # which goes on for a screen
    return f"{type(error).__name__}: {text.strip()[:600]}"

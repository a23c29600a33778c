"""Checkpoints on Orbax: save, restore onto any devices, and find the point from which a run goes on.

    checkpoints/00000040/           one folder per saved step, eight digits
    checkpoints/best/1-step-40/     a slot of its own, which `keep` does not count

What a caller may rely on:
* A checkpoint counts only once Orbax has committed it. What a killed or failed save leaves behind is never listed, and
  the next save clears it away. Older checkpoints go only after the new one is committed.
* A state is stored as a flat {"params/layers/q": array} of its leaves and comes back in the structure of the abstract
  state given to `restore`, bit for bit, dtypes included, on the shardings given there: no flax or optax type is stored.
* `meta` is any JSON dictionary. What makes two runs the same run goes under "fingerprint" (see `check_same_run`).

Saving blocks until the checkpoint is committed. With several processes all of them call save and restore alike.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

FORMAT = 1  # of what is inside a checkpoint; goes up when old ones can no longer be read
MOST_SHOWN = 5  # differences of a kind that an error spells out; further ones are counted
State = Any  # a pytree of arrays
PathLike = str | os.PathLike[str]

_COMMITTED = "commit_success.txt"  # Orbax writes it last, on local disks and in buckets alike


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read, or belongs to another run; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them in `folder`, and the best one in `folder`/best.

    `folder`: a local path or a bucket (gs://...). Nothing is created or deleted before the first save.
    """

    def __init__(self, folder: PathLike, keep: int):
        if keep < 1:
            raise ValueError(f"checkpoints to keep must be at least 1, found {keep}")
        self.folder, self.keep = _absolute(folder), keep
        self._written: set[int] = set()

    def steps(self) -> list[int]:
        """Return the steps of all good checkpoints, oldest first."""
        return _committed_steps(self.folder)

    def latest(self) -> int | None:
        """Return the newest good step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> epath.Path | None:
        """Return the folder of the checkpoint saved last by `save_best`, or None."""
        return max(_committed_best(self.folder), default=(0, None))[1]

    def path(self, step: int) -> epath.Path:
        """Return the folder of this step's checkpoint, whether it exists or not."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Save the state as this step's checkpoint and then delete all but the newest `keep`; return its folder.

        Saving a step again that this object has saved does nothing: within a run a step has one state.

        Raises CheckpointError when the disk is full or saving fails in another way (earlier checkpoints stay as they
        are) and when an earlier run's checkpoint of this step exists; TypeError for leaves that are not arrays.
        """
        path = self.path(step)
        if step in self._written:
            return path
        if step in self.steps():
            advice = "resume from it, call set_aside_after, or choose another folder"
            raise CheckpointError(f"{path} exists already, from an earlier run; {advice}")
        self._write(path, step, state, meta)
        self._written.add(step)
        for old in self.steps()[: -self.keep]:
            _remove(self.path(old))
        return path

    def save_best(self, step: int, state: State, meta: Mapping[str, Any]) -> epath.Path:
        """Save the state in the slot for the best one; the one before is deleted once this one is committed."""
        before = _committed_best(self.folder)
        number = max(before, default=(0, None))[0] + 1
        path = self.folder / "best" / f"{number}-step-{step}"
        self._write(path, step, state, meta)
        for _, old in before:
            _remove(old)
        return path

    def restore(self, path_or_step: PathLike | int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """Return (state, meta) of one of these checkpoints by its step, or of any by its folder; see `restore`."""
        path = self.path(path_or_step) if isinstance(path_or_step, int) else path_or_step
        return restore(path, abstract_state)

    def set_aside_after(self, step: int) -> list[epath.Path]:
        """Rename all checkpoints newer than `step` so that they no longer count; return their new folders.

        For a run that goes on from an earlier point (or, with step -1, begins anew) in a folder that holds later ones.
        """
        moved = []
        for later in [other for other in self.steps() if other > step]:
            number = 1 + len(list(self.folder.glob(f"{later:08d}.aside-*")))
            moved.append(self.folder / f"{later:08d}.aside-{number}")
            if jax.process_index() == 0:
                self.path(later).rename(moved[-1])
        return moved

    def _write(self, path: epath.Path, step: int, state: State, meta: Mapping[str, Any]) -> None:
        leaves = _savable_leaves(state)
        header = {"format": FORMAT, "step": step, "meta": _as_json(meta)}
        _clear_leftovers(path.parent)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _orbax():
                ocp.save(path, leaves, custom_metadata=header)
        except Exception as error:
            _clear_leftovers(path.parent)
            raise CheckpointError(self._why_not_saved(path, leaves, error)) from error

    def _why_not_saved(self, path: epath.Path, leaves: Mapping[str, Any], error: Exception) -> str:
        needed = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
        text = f"saving {path} failed: {_first_line(error)}\n  It needs {needed:,.1f} MiB"
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
    differ: the first few of each kind and how many), or if its files are damaged.
    """
    path = _absolute(path)
    saved, meta = _read_header(path)
    wanted = _abstract_leaves(abstract_state)
    differences = _differences(saved, wanted, partial)
    if differences:
        advice = "Give the configuration it was made with, or resume=none to begin anew."
        raise CheckpointError("\n  ".join([f"{path} is a checkpoint of another model:", *differences, advice]))
    with _reading(path, partial):
        loaded = ocp.load(path, wanted)
    scalars = [isinstance(leaf, np.generic) for leaf in jax.tree.leaves(abstract_state)]
    leaves = [loaded[name][()] if scalar else loaded[name] for name, scalar in zip(wanted, scalars, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta


def read_meta(path: PathLike) -> dict[str, Any]:
    """Return the meta dictionary of the checkpoint in this folder; raise CheckpointError if there is none."""
    return _read_header(_absolute(path))[1]


def resolve_resume(resume: str, folder: PathLike) -> epath.Path | None:
    """Return the checkpoint to go on from, or None to begin anew.

    resume: "none"; "latest", the newest good one in `folder`, None if there is none yet; or a path, to a checkpoint or
    to a folder of checkpoints (a run's folder too), whose newest is taken. CheckpointError if the path has none.
    """
    if resume == "none":
        return None
    if resume == "latest":
        return _newest(_absolute(folder))
    path = _absolute(resume)
    if not path.exists():
        raise CheckpointError(f"resume={resume}: no such folder. Give latest, none, or a checkpoint's folder")
    if _is_committed(path):
        return path
    newest = _newest(path) or _newest(path / "checkpoints")
    if newest is None:
        advice = f"A checkpoint is a folder such as {path / '00000040'} with {_COMMITTED} in it"
        raise CheckpointError(f"resume={resume}: neither a complete checkpoint nor a folder of some. {advice}")
    return newest


def check_same_run(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing every field in which meta["fingerprint"] differs from this run's fingerprint."""
    if "fingerprint" not in meta:
        raise CheckpointError("the checkpoint's meta has no fingerprint, so it cannot be told which run it belongs to")
    sides = (_as_json(meta["fingerprint"]), _as_json(fingerprint))
    saved, now = (_by_name(side, separator=".", is_leaf=lambda leaf: leaf is None) for side in sides)
    lines = []
    for name in sorted(saved.keys() | now.keys()):
        was, is_now = (json.dumps(side[name]) if name in side else "absent" for side in (saved, now))
        if was != is_now:
            lines.append(f"{name}: saved {was}, now {is_now}")
    if lines:
        advice = "Set these fields back, or begin anew with resume=none in another output_dir."
        raise CheckpointError("\n  ".join(["the checkpoint is of a run with another configuration:", *lines, advice]))


def _savable_leaves(state: State) -> dict[str, Any]:
    leaves = _by_name(state)
    wrong = []
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            wrong.append(f"{name} is {type(leaf).__name__}: store it as np.int32(...) or np.float32(...), or in meta")
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            wrong.append(f"{name} is a random key: store jax.random.key_data of it, or make it from the seed")
        elif leaf.size == 0:
            wrong.append(f"{name} has no elements, shape {leaf.shape}: leave it out")
    if wrong:
        raise TypeError("\n  ".join(["only arrays can be saved:", *_some(wrong)]))
    return {name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for name, leaf in leaves.items()}


def _abstract_leaves(state: State) -> dict[str, Any]:
    """Return what Orbax is to make of each leaf, by name."""
    leaves = _by_name(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray | np.generic):
            leaves[name] = np.empty(leaf.shape, leaf.dtype)
        elif isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        else:
            advice = "give a jax.ShapeDtypeStruct or an array"
            raise TypeError(f"{name} of the abstract state is {type(leaf).__name__}: {advice}")
    return leaves


def _by_name(tree: Any, separator: str = "/", is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the tree's leaves in their order, named like "opt_state/0/mu/head"."""
    named = dict[str, Any]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=separator)
        if name in named:
            raise ValueError(f"two leaves are both named {name}: rename one of the keys on the way to them")
        named[name] = leaf
    return named


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], partial: bool) -> list[str]:
    """Return a line for each way in which the leaves differ, by names, shapes and dtypes."""
    here, there = ({name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in side.items()} for side in (wanted, saved))
    kinds = {
        "wanted but not in it": [name for name in here if name not in there],
        "in it but not wanted": [name for name in there if name not in here and not partial],
        "of another form": [
            f"{name} is {there[name]}, wanted {form}" for name, form in here.items() if there.get(name, form) != form
        ],
    }
    return [f"{len(names)} {kind}: {'; '.join(_some(names))}" for kind, names in kinds.items() if names]


def _read_header(path: epath.Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return what is known of each saved leaf (shape, dtype) by name, and the meta dictionary."""
    if not _is_committed(path):
        raise CheckpointError(f"{path} is not a complete checkpoint" + ("" if path.exists() else " (no such folder)"))
    with _reading(path):
        header = ocp.metadata(path)
        if not header.metadata:
            raise ValueError("the arrays cannot be read")
    ours = header.custom_metadata
    if not isinstance(ours, dict) or ours.get("format") != FORMAT:
        raise CheckpointError(f"{path} is an Orbax checkpoint, but not one of this program in format {FORMAT}")
    return header.metadata, ours["meta"]


def _is_committed(path: epath.Path) -> bool:
    return (path / _COMMITTED).exists() and ocp.is_orbax_checkpoint(path)


def _committed_steps(folder: epath.Path) -> list[int]:
    """Return the steps of the good checkpoints in a folder, ascending."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name) and _is_committed(folder / name))


def _committed_best(folder: epath.Path) -> list[tuple[int, epath.Path]]:
    """Return (number, folder) of each good checkpoint in the slot for the best one: more than one only after a kill."""
    slot = folder / "best"
    found = [(re.fullmatch(r"(\d+)-step-\d+", entry.name), entry) for entry in slot.iterdir()] if slot.is_dir() else []
    return [(int(match[1]), entry) for match, entry in found if match and _is_committed(entry)]


def _newest(folder: epath.Path) -> epath.Path | None:
    steps = _committed_steps(folder)
    return folder / f"{steps[-1]:08d}" if steps else None


def _clear_leftovers(folder: epath.Path) -> None:
    """Delete what killed or failed saves and deletions left in the folder."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        ours = re.fullmatch(r"(\d{8}|\d+-step-\d+)(\.orbax-checkpoint-tmp.*)?", entry.name)
        if ours and (ours[2] or not (entry / _COMMITTED).exists()):
            _remove(entry)


def _remove(path: epath.Path) -> None:
    """Delete a checkpoint so that it stops counting at once, even if the deletion is interrupted."""
    if jax.process_index() != 0:
        return
    with contextlib.suppress(OSError):  # a leftover does no harm, and the next save tries again
        (path / _COMMITTED).unlink(missing_ok=True)
        path.rmtree(missing_ok=True)


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


def _absolute(path: PathLike) -> epath.Path:
    text = os.fspath(path)
    return epath.Path(text if "://" in text else Path(text).expanduser().absolute())


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta as it will be read back (tuples as lists); raise CheckpointError if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta must be plain JSON (numbers other than NaN, texts, lists): {error}") from None


def _some(items: list[str]) -> list[str]:
    return items[:MOST_SHOWN] + ([f"... and {len(items) - MOST_SHOWN} more"] if len(items) > MOST_SHOWN else [])


def _first_line(error: Exception) -> str:
    text = str(error).split(" [tensorstore_spec=")[0]  # which goes on for a screen
    return f"{type(error).__name__}: {text.strip()[:600]}"

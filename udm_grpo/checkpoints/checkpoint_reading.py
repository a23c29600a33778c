"""Read training checkpoints: select the one to resume from, load it, and check that it is of the same run."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from rewards_bridge.errors import UserError
from udm_grpo.checkpoints.checkpoint_contents import damaged_files
from udm_grpo.checkpoints.checkpoint_folders import COMMITTED, PathLike, absolute, committed_steps, is_committed
from udm_grpo.checkpoints.checkpoint_leaves import State, abstract_leaves, by_name, differences, some
from udm_grpo.checkpoints.checkpoint_storage import plain
from udm_grpo.files.finite import named, nonfinite

FORMAT = 1  # version of a checkpoint's contents; increased when old ones can no longer be read
MANIFEST = "state/manifest.ocdbt"
"""The file in which Orbax records where each array of a checkpoint is stored."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or read, or belongs to another run; the message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that was once complete cannot be read; with several processes, all of them raise this."""


def restore(path: PathLike, abstract_state: State, partial: bool = False) -> tuple[State, dict[str, Any]]:
    """Return (state, meta) of the checkpoint in this folder, in the structure and on the shardings of abstract_state.

    Leaves of abstract_state: jax.ShapeDtypeStruct with a sharding (without one: the first device) or a jax.Array give
    a jax.Array; a NumPy array or scalar gives the same. With `partial`, other leaves of the checkpoint are not read.

    Raises CheckpointError if there is no good checkpoint or if it is of another model (listing which names, shapes and
    dtypes differ), and DamagedError if its files are damaged or numbers in it are not finite.
    """
    path = absolute(path)
    saved, meta = read_header(path)
    expected = abstract_leaves(abstract_state)
    if lines := differences(saved, expected, partial):
        advice = "Use the configuration it was saved with, or resume=none to start over."
        raise CheckpointError("\n  ".join([f"{path} is a checkpoint of another model:", *lines, advice]))
    if lines := damaged_files(path):
        raise DamagedError(f"{path} is damaged: {'; '.join(some(lines))}\n  Resume from another checkpoint.")
    loaded = _load(path, expected, partial)
    if bad := nonfinite(loaded):
        raise DamagedError(f"{path}: NaN or infinite numbers in {named(bad)}. Resume from an earlier checkpoint.")
    scalars = [isinstance(leaf, np.generic) for leaf in jax.tree.leaves(abstract_state)]
    leaves = [loaded[name][()] if scalar else loaded[name] for name, scalar in zip(expected, scalars, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), meta


def _load(path: epath.Path, abstract: Mapping[str, Any], partial: bool) -> Mapping[str, Any]:
    """Return the arrays by name.

    Raises DamagedError; with several processes a CheckpointError, since the others may still be waiting.
    """
    try:
        with reading(path, partial):
            return ocp.load(plain(path), abstract)
    except DamagedError as error:
        if jax.process_count() > 1:
            raise CheckpointError(str(error)) from error
        raise


def read_meta(path: PathLike) -> dict[str, Any]:
    """Return the meta dictionary of the checkpoint in this folder; raise CheckpointError if there is none."""
    return read_header(absolute(path))[1]


def resolve_resume(resume: str, folder: PathLike) -> epath.Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    resume: "none"; "latest", the newest good one in `folder`, None if there is none yet; or the path of a checkpoint or
    of a folder of checkpoints (or of a run), whose newest is used. Damaged newest ones are skipped with a warning.
    Raises CheckpointError if the path has no checkpoints, or only damaged ones.
    """
    if resume == "none":
        return None
    if resume == "latest":
        return newest_readable(absolute(folder))
    path = absolute(resume)
    if not path.exists():
        raise CheckpointError(f"resume={resume}: no such folder. Use latest, none, or a checkpoint's folder")
    if is_committed(path):
        return path
    newest = newest_readable(path) or newest_readable(path / "checkpoints")
    if newest is None:
        advice = f"A checkpoint is a folder such as {path / '00000040'} with {COMMITTED} in it"
        raise CheckpointError(f"resume={resume}: neither a complete checkpoint nor a folder of checkpoints. {advice}")
    return newest


def newest_readable(folder: epath.Path, before: int | None = None) -> epath.Path | None:
    """Return the newest checkpoint in a folder that can be opened; None if there are no checkpoints.

    Damaged newer ones are skipped, with a warning for each. before: consider only steps before this one. Raises
    CheckpointError if there are only damaged ones.
    """
    steps = [step for step in committed_steps(folder) if before is None or step < before]
    for step in reversed(steps):
        path = folder / f"{step:08d}"
        try:
            read_header(path)
        except DamagedError as error:
            older = "The checkpoint before it is tried instead" if step > steps[0] else "There is none before it"
            print(f"warning: {error}\n  {older}.", file=sys.stderr)
        else:
            return path
    if steps:
        advice = "restore a copy of one of them, or start over with resume=none in another output_dir"
        raise CheckpointError(f"all {len(steps)} checkpoints in {folder} are damaged; {advice}.")
    return None


def check_same_run(meta: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise CheckpointError listing every field in which meta["fingerprint"] differs from this run's fingerprint."""
    if "fingerprint" not in meta:
        raise CheckpointError("the checkpoint's meta has no fingerprint, so the run that it belongs to is unknown")
    sides = (as_json(meta["fingerprint"]), as_json(fingerprint))
    saved, now = (by_name(side, separator=".", is_leaf=lambda leaf: leaf is None) for side in sides)
    lines = []
    for name in sorted(saved.keys() | now.keys()):
        was, is_now = (json.dumps(side[name]) if name in side else "absent" for side in (saved, now))
        if was != is_now:
            lines.append(f"{name}: saved {was}, now {is_now}")
    if lines:
        advice = "Restore these values, or start over with resume=none in another output_dir."
        raise CheckpointError("\n  ".join(["the checkpoint is of a run with another configuration:", *lines, advice]))


def read_header(path: epath.Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the metadata of each saved leaf (shape, dtype) by name, and the meta dictionary."""
    if not is_committed(path):
        raise CheckpointError(f"{path} is not a complete checkpoint" + ("" if path.exists() else " (no such folder)"))
    with reading(path):
        if not ocp.is_orbax_checkpoint(plain(path)):
            raise ValueError("Orbax does not recognize it as a checkpoint")
        if not (path / MANIFEST).read_bytes():  # checked first, since TensorStore's own error fills the screen
            raise ValueError(f"{MANIFEST} is empty")
        header = ocp.metadata(plain(path))
        if not header.metadata:
            raise ValueError("the arrays cannot be read")
    ours = header.custom_metadata
    if not isinstance(ours, dict) or "format" not in ours:
        raise DamagedError(f"{path} is damaged: it has neither a format nor a meta\n  Resume from another checkpoint.")
    if ours["format"] != FORMAT:
        raise CheckpointError(f"{path} is an Orbax checkpoint in format {ours['format']}, expected format {FORMAT}")
    return header.metadata, ours["meta"]


def orbax_context(partial: bool = False) -> ocp.Context:
    """Return the settings with which Orbax saves and loads; `partial`: allow loading only some of the leaves."""
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False  # otherwise a failed save leaves threads waiting
    context.array.saving.use_compression = False  # weights hardly shrink (8 %), and saving takes three times as long
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def reading(path: epath.Path, partial: bool = False) -> Iterator[None]:
    """Turn any error within the block into a DamagedError that names the checkpoint."""
    try:
        with orbax_context(partial):
            yield
    except Exception as error:
        raise DamagedError(f"{path} is damaged: {first_line(error)}\n  Resume from another checkpoint.") from error


def as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return meta as it will be read back (tuples as lists); raise CheckpointError if it is not plain JSON."""
    try:
        return json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta must be plain JSON (finite numbers, strings, lists): {error}") from None


def first_line(error: Exception) -> str:
    """Return an error's type and the readable part of its message."""
    text = str(error).split(" [tensorstore_spec=")[0]  # the rest fills a screen
    return f"{type(error).__name__}: {text.strip()[:600]}"

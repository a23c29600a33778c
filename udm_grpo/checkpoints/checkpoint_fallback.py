"""Goes back to an older checkpoint where the newest one turns out to be damaged while it is read."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from udm_grpo.checkpoints.checkpoint_folders import PathLike, absolute
from udm_grpo.checkpoints.checkpoint_leaves import State
from udm_grpo.checkpoints.checkpoint_reading import DamagedError, newest_readable, read_meta, restore


def restore_or_older(
    path: PathLike, abstract_state: State, resume: str, check: Callable[[Mapping[str, Any]], None]
) -> tuple[State, dict[str, Any]]:
    """Return (state, meta) of a checkpoint or, with a warning, of the newest older one beside it that is whole.

    resume: what the user asked for; a checkpoint that it names itself is the only one that will do. check: raises where
    the meta of a checkpoint is not of this run; every one that is tried is checked first.

    Raises what `check` and `restore` raise. Of several processes all go back alike, since each knows of the damage that
    another has found.
    """
    path = absolute(path)
    while True:
        try:
            check(read_meta(path))
            return restore(path, abstract_state)
        except DamagedError as error:
            named = resume != "latest" and absolute(resume) == path
            older = None if named else _older(path)
            if older is None:
                raise
            print(f"warning: {error}\n  Going back to {older}.", file=sys.stderr)
            path = older


def restore_newest(folder: PathLike, abstract_state: State) -> tuple[State, dict[str, Any]] | None:
    """Return (state, meta) of the newest checkpoint in a folder that is whole; None if there is none at all.

    Warns of each newer one that is damaged. Raises CheckpointError if all are.
    """
    newest = newest_readable(absolute(folder))
    return None if newest is None else restore_or_older(newest, abstract_state, "latest", lambda meta: None)


def _older(path: epath.Path) -> epath.Path | None:
    return newest_readable(path.parent, before=int(path.name)) if path.name.isdecimal() else None

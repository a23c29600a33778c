"""Fall back to an older checkpoint when the newest one turns out to be damaged."""

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
    """Return (state, meta) of a checkpoint or, with a warning, of the newest intact older one in the same folder.

    resume: the user's setting; if it names this checkpoint itself, no other one is tried. check: raises if the meta of
    a checkpoint is not of this run; it is called for every checkpoint before that is restored.

    Raises what `check` and `restore` raise. All processes fall back together, since each learns of the damage that
    another has detected.
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
    """Return (state, meta) of the newest intact checkpoint in a folder; None if there are no checkpoints.

    Warns about each newer one that is damaged. Raises CheckpointError if all are.
    """
    newest = newest_readable(absolute(folder))
    return None if newest is None else restore_or_older(newest, abstract_state, "latest", lambda meta: None)


def _older(path: epath.Path) -> epath.Path | None:
    return newest_readable(path.parent, before=int(path.name)) if path.name.isdecimal() else None

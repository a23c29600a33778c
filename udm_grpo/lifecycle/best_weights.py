"""The best weights of a run by held-out score: saved during training, carried over on resume, exported at the end.

The run's position records the best score so far. The checkpoint with those weights is identified by its own metadata
(run, fingerprint, step and score); anything else in the folder, such as checkpoints of an abandoned branch, is ignored.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from udm_grpo.batches import Params, TrainState
from udm_grpo.checkpoints.checkpoint import CheckpointError, read_meta, restore
from udm_grpo.checkpoints.checkpoint_folders import absolute, committed_best, step_of_best
from udm_grpo.lifecycle.identity import folder_of
from udm_grpo.multihost import hosts
from udm_grpo.run import Position, Run, begin


def judged(state: TrainState) -> Params:
    """Return the weights to evaluate: the moving average if there is one, else the parameters."""
    return state.params if state.ema is None else state.ema


def save_best(run: Run, step: int, params: Params, score: float) -> None:
    """Start saving the best weights so far."""
    run.checkpoints.begin_best(step, {"params": params}, run.identity.saved_with(score=score))


def best_or_last(run: Run, state: TrainState, position: Position) -> Params:
    """Return the final weights of the run: the best ones if they are kept and there are any, else the last ones.

    Raises CheckpointError if the best weights are not where they were saved.
    """
    last = judged(state)
    if not run.config.checkpoint.keep_best or position.best is None:
        return last
    return _read(_find(str(run.checkpoints.folder), run.identity.saved_with(), position), last)


def carried(run: Run, abstract: TrainState, position: Position | None) -> tuple[int, Params] | None:
    """Return (step, best weights) to copy from the folder that the run resumes from; None if it already has its own.

    Raises CheckpointError if they are missing: the run's result would silently differ.
    """
    if position is None or position.best is None or not run.config.checkpoint.keep_best:
        return None
    assert run.identity.resume is not None
    path = _find(folder_of(run.identity.resume), run.identity.meta, position)
    if run.identity.here and run.identity.meta.get("run") == run.identity.id:
        return None
    return step_of_best(absolute(path)), _read(path, judged(abstract))


def _find(folder: str, same: Mapping[str, Any], position: Position) -> str:
    """Return the checkpoint with the best weights at this position of the run that `same` describes."""
    path = hosts.from_primary(lambda: _matching(folder, same, position))
    if path is None:
        raise CheckpointError(
            f"checkpoint.keep_best: the best weights so far, with the held-out score {position.best:.6g}, are not in "
            f"{folder}/best. Restore that folder next to the checkpoints, or resume from another checkpoint."
        )
    return path


def _matching(folder: str, same: Mapping[str, Any], position: Position) -> str | None:
    expected = [json.dumps(same.get(name), sort_keys=True) for name in ("run", "fingerprint")]
    for _, path in sorted(committed_best(absolute(folder)), reverse=True):
        try:
            meta = read_meta(path)
        except CheckpointError:
            continue  # it may belong to an abandoned branch; if not, the caller reports what is missing
        named = [json.dumps(meta.get(name), sort_keys=True) for name in ("run", "fingerprint")]
        if named == expected and step_of_best(path) <= position.step and meta.get("score") == position.best:
            return str(path)
    return None


def _read(path: str, like: Params) -> Params:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
    params: Params = restore(path, {"params": abstract})[0]["params"]
    return params


def take_over(run: Run, abstract: TrainState, position: Position | None, stack: contextlib.ExitStack) -> Run:
    """Call `run.begin`, and copy the best weights over if the run resumes from another folder."""
    brought = carried(run, abstract, position)
    run = begin(run, position, stack)
    if brought is not None and position is not None and position.best is not None:
        save_best(run, *brought, position.best)
        run.checkpoints.finish()
    return run

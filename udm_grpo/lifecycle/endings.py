"""How a run ends before its time: asked to stop or because of an error, its last whole iteration is saved first."""

import sys
from dataclasses import dataclass
from typing import Any

import jax

from udm_grpo.batches import Params, TrainState
from udm_grpo.lifecycle.interruption import Interruption
from udm_grpo.lifecycle.iteration_checks import DivergedError
from udm_grpo.multihost import hosts
from udm_grpo.run import Position, Run, save
from udm_grpo.run_reports import Reports
from udm_grpo.scoring.evaluation_parts import FOLDER
from udm_grpo.shared_rewards import ScoringFailedError


@dataclass
class Standing:
    """The last whole iteration of a run; replaced by the next one when that is whole."""

    state: TrainState
    """An update uses its arrays up; then there is nothing here that could be saved."""
    position: Position
    saved: int | None
    """Iterations of the newest checkpoint, if there is one."""


def stopped_early(asked: Interruption) -> dict[str, Any]:
    """Return the summary of a run that was asked to stop before anything was made that could be saved."""
    who = _who(asked)
    if hosts.is_primary():
        text = f"stopped by {who} before the first iteration; nothing was there to be saved"
        print(text, file=sys.stderr, flush=True)
    return {"iterations": 0, "seconds": 0.0, "stopped": True}


def stop(run: Run, reports: Reports, reference: Params, standing: Standing) -> dict[str, Any]:
    """Save a run that was asked to stop, and return how far it came."""
    _save(run, reference, standing)
    position = standing.position
    reports.progress.message(
        f"stopped by {_who(run.asked)} after {position.step} of "
        f"{run.config.iterations} iterations; resume with --config.checkpoint.resume=latest"
    )
    return {"iterations": position.step, "seconds": position.seconds, "stopped": True}


def save_after(error: Exception, run: Run, reports: Reports, reference: Params, standing: Standing) -> None:
    """Save the last whole iteration because of an error, which the caller raises again; say what became of it.

    Not after a DivergedError, whose numbers nobody wants; with several processes only after an error that all of them
    have at the same point: of a scorer, or of what a process does by itself (see `Interruption.held`).
    """
    together = jax.process_count() == 1 or isinstance(error, ScoringFailedError) or run.asked.failed_together
    if isinstance(error, DivergedError) or not together:
        return
    step, consumed = standing.position.step, any(leaf.is_deleted() for leaf in jax.tree.leaves(standing.state))
    worthless = step == 0 and not standing.position.base and not hosts.from_primary((run.output / FOLDER).exists)
    if standing.saved == step or worthless or consumed:
        return
    try:
        _save(run, reference, standing)
    except Exception as problem:
        reports.progress.message(f"warning: the {step} whole iterations could not be saved: {problem}")
        return
    reports.progress.message(
        f"{step} of {run.config.iterations} iterations are saved; resume with --config.checkpoint.resume=latest"
    )


def _save(run: Run, reference: Params, standing: Standing) -> None:
    if standing.saved != standing.position.step:
        save(run, standing.state, reference, standing.position)
        standing.saved = standing.position.step
    run.checkpoints.finish()
    hosts.any_process(False)  # process 0 makes the checkpoint valid last; nobody leaves before


def _who(asked: Interruption) -> str:
    """Return the signal that asked the run to stop, of the first process that got one.

    All processes call this alike.
    """
    return next(filter(None, hosts.gather(asked.by)), "a signal")

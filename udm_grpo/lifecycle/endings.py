"""Early endings of a run, by a stop request or an error: its last complete iteration is saved first."""

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
    """The last complete iteration of a run; replaced when the next one is complete."""

    state: TrainState
    """An update consumes its arrays (buffer donation); from then on nothing here can be saved."""
    position: Position
    saved: int | None
    """Iteration of the newest checkpoint, if there is one."""


def stopped_early(asked: Interruption) -> dict[str, Any]:
    """Return the summary of a run that was asked to stop before there was anything to save."""
    who = _who(asked)
    if hosts.is_primary():
        text = f"stopped by {who} before the first iteration; there was nothing to save"
        print(text, file=sys.stderr, flush=True)
    return {"iterations": 0, "seconds": 0.0, "stopped": True}


def stop(run: Run, reports: Reports, reference: Params, standing: Standing) -> dict[str, Any]:
    """Save a run that was asked to stop, and return its summary."""
    _save(run, reference, standing)
    position = standing.position
    reports.progress.message(
        f"stopped by {_who(run.asked)} after {position.step} of "
        f"{run.config.iterations} iterations; resume with --config.checkpoint.resume=latest"
    )
    return {"iterations": position.step, "seconds": position.seconds, "stopped": True}


def save_after(error: Exception, run: Run, reports: Reports, reference: Params, standing: Standing) -> None:
    """Save the last complete iteration after an error, which the caller raises again, and report the outcome.

    Nothing is saved after a DivergedError, whose numbers are useless. With several processes, it is saved only after
    errors that all of them raise at the same point: of a scorer, or those that `Interruption.held` collects.
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
        reports.progress.message(f"warning: the {step} complete iterations could not be saved: {problem}")
        return
    reports.progress.message(
        f"{step} of {run.config.iterations} iterations are saved; resume with --config.checkpoint.resume=latest"
    )


def _save(run: Run, reference: Params, standing: Standing) -> None:
    if standing.saved != standing.position.step:
        save(run, standing.state, reference, standing.position)
        standing.saved = standing.position.step
    run.checkpoints.finish()
    hosts.any_process(False)  # process 0 commits the checkpoint last; the others wait for it


def _who(asked: Interruption) -> str:
    """Return the name of the signal that asked the first such process to stop.

    All processes must call this.
    """
    return next(filter(None, hosts.gather(asked.by)), "a signal")

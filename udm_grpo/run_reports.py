"""Training logs: metrics, evaluations, progress bar, and the report at the end."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from rewards_bridge.composition import apart
from udm_grpo.config import RunConfig, as_dict
from udm_grpo.files.atomic import remove_unfinished
from udm_grpo.lifecycle.iteration_checks import SignalWatch, check_finite
from udm_grpo.multihost import hosts
from udm_grpo.report import NAME, write_report
from udm_grpo.reporting.environment import begin
from udm_grpo.reporting.metrics import JsonLines, MetricsWriter, Progress, StageTimer
from udm_grpo.reporting.raw_values import means, missing
from udm_grpo.reporting.run_folder import RunFolderError
from udm_grpo.run import Position, Run
from udm_grpo.scoring.rewards import Rewards

ADVICE = (
    "The checkpoints in {output}/checkpoints are from before. Lower optimizer.learning_rate or raise "
    "optimizer.warmup_updates, and begin anew."
)
"""What to do about a run that has diverged."""


SHOWN = ("kl", "entropy")
"""Metrics of an objective that stand in the progress line where there are any of these; the files hold all of them."""


@dataclass(frozen=True)
class Reports:
    """The logs of a run."""

    writer: MetricsWriter
    evaluations: JsonLines | None
    """Of process 0; the others write nothing."""
    progress: Progress
    timer: StageTimer
    signal: SignalWatch = field(default_factory=SignalWatch)


def open_reports(run: Run, position: Position | None, stack: contextlib.ExitStack) -> Reports:
    """Open the run's files and its progress bar; lines past `position` (None: a fresh run) are dropped."""
    config, output, identity = run.config, run.output, run.identity
    resume_after = None if position is None else position.step
    primary = hosts.is_primary()
    if primary:
        remove_unfinished(output)
        begin(output, resume_after, identity.id, identity.origin)
    shown = {"run": identity.id, **as_dict(config)}
    writer = MetricsWriter(
        output, config.logging, resume_after=resume_after, config=shown, primary=primary, run=identity.id
    )
    stack.enter_context(writer)
    evaluations = None
    if primary:
        # What has not been looked at will be: a line on it is of an attempt that was killed.
        evaluated = resume_after if position is None else position.step - (not position.looked)
        lines = JsonLines(output / "evaluations.jsonl", evaluated, identity.id)
        evaluations = stack.enter_context(contextlib.closing(lines))
    unseen = None if primary else io.StringIO()
    progress = Progress(config.iterations, resume_after or 0, plain_every=10, stream=unseen)
    stack.enter_context(contextlib.closing(progress))
    return Reports(writer, evaluations, progress, StageTimer())


def numbers_of(rewards: Rewards, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Return the numbers of an iteration that have to be finite: the mean reward, and the objective's metrics."""
    return {
        "reward": float(np.mean(rewards.score)),
        **{name: float(value) for name, value in jax.device_get(metrics).items()},
    }


def write_iteration(
    reports: Reports, config: RunConfig, step: int, rewards: Rewards, numbers: Mapping[str, float]
) -> None:
    """Write one iteration's numbers, of `numbers_of` and of the single scores; `step` counts iterations done."""
    seconds = reports.timer.take()
    raw, lacking = means(rewards.raw), missing(rewards.raw)
    groups = rewards.score.reshape(-1, config.rollout.group_size)
    line = {
        "reward": numbers["reward"],
        "reward_std": float(np.std(rewards.score)),
        "dead_groups": float(np.mean(np.ptp(groups, axis=1) == 0)),
        "raw": raw,
        **({"raw_missing": lacking} if lacking else {}),
        **numbers,
        "seconds": seconds,
    }
    reports.writer.write(step, line)
    if warning := reports.signal.watch(step, numbers["skipped"]):
        reports.progress.message(warning)
    own = {name: numbers[name] for name in ("reward", *SHOWN) if name in numbers}
    reports.progress.update({"reward": own["reward"], **apart(raw, own), **own}, seconds)


def check_diverged(config: RunConfig, step: int, numbers: Mapping[str, float]) -> None:
    """Raise DivergedError if a number of an iteration is not finite, in all processes alike."""
    check_finite("iteration", step, numbers, ADVICE.format(output=config.output_dir))


def write_page(reports: Reports, output: Path) -> None:
    """Write report.html; a run that has ended well does not fail for its report."""
    try:
        write_report([output], output / NAME)
        reports.progress.message(f"report: {output / NAME}")
    except (RunFolderError, OSError) as error:
        reports.progress.message(f"no report: {error}")

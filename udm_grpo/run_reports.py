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
    "The checkpoints in {output}/checkpoints precede this. Lower optimizer.learning_rate or raise "
    "optimizer.warmup_updates, and start over."
)
"""Advice for a run that has diverged."""


SHOWN = ("kl", "entropy")
"""Metrics shown in the progress line if the objective has them; the files contain all metrics."""


@dataclass(frozen=True)
class Reports:
    """The logs of a run."""

    writer: MetricsWriter
    evaluations: JsonLines | None
    """Only in process 0; the others write nothing."""
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
        # If this step is still to be evaluated, its line in the file is of an attempt that was killed.
        evaluated = resume_after if position is None else position.step - (not position.looked)
        lines = JsonLines(output / "evaluations.jsonl", evaluated, identity.id)
        evaluations = stack.enter_context(contextlib.closing(lines))
    unseen = None if primary else io.StringIO()
    progress = Progress(config.iterations, resume_after or 0, plain_every=10, stream=unseen)
    stack.enter_context(contextlib.closing(progress))
    return Reports(writer, evaluations, progress, StageTimer())


def numbers_of(rewards: Rewards, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Return an iteration's mean reward and its metrics, all of which must be finite."""
    return {
        "reward": float(np.mean(rewards.score)),
        **{name: float(value) for name, value in jax.device_get(metrics).items()},
    }


def write_iteration(
    reports: Reports, config: RunConfig, step: int, rewards: Rewards, numbers: Mapping[str, float]
) -> None:
    """Log one iteration: the result of `numbers_of` and the individual scores; `step` counts completed iterations."""
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
    """Raise DivergedError, in all processes, if a number of an iteration is not finite."""
    check_finite("iteration", step, numbers, ADVICE.format(output=config.output_dir))


def write_page(reports: Reports, output: Path) -> None:
    """Write report.html; a failure here does not make a completed run fail."""
    try:
        write_report([output], output / NAME)
        reports.progress.message(f"report: {output / NAME}")
    except (RunFolderError, OSError) as error:
        reports.progress.message(f"no report: {error}")

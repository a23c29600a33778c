"""Train a model by UDM-GRPO.

    python -m udm_grpo.train --config configs/shapes.py
    python -m udm_grpo.train --config configs/shapes.py:smoke --config.output_dir=outputs/try --config.seed=1
    python -m udm_grpo.train --config configs/shapes.py --config.checkpoint.resume=latest
    python -m udm_grpo.train --config configs/shapes.py --compile_only       # what it needs; see compile_only.py

An iteration, as `train` below reads: prompts, rollout, pictures to the scorer, reference log-probabilities while it
scores, advantages, update.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rewards_bridge.errors import BridgeError, UsageError
from rewards_bridge.scorers.base import Scores
from udm_grpo import compile_only
from udm_grpo import mesh as meshes
from udm_grpo.batches import Params, Rollout, TrainState
from udm_grpo.command_line import field_values, parse
from udm_grpo.config import ConfigError, RunConfig, as_dict
from udm_grpo.config_checks import validate
from udm_grpo.evaluation import evaluate, evaluate_all, pictures
from udm_grpo.host.checkpoint import CheckpointError
from udm_grpo.host.checkpoint import restore as restore_checkpoint
from udm_grpo.host.metrics import JsonLines, MetricsWriter, Progress, StageTimer, write_json
from udm_grpo.host.pictures import before_after, image_grid
from udm_grpo.host.rewards import Rewards, collect
from udm_grpo.host.weights import WeightsError, save_folder
from udm_grpo.mesh import MeshError
from udm_grpo.run import Position, Run, Stage, exported, open_run, save, start


@dataclass(frozen=True)
class Reports:
    """Where a run tells how it goes."""

    writer: MetricsWriter
    evaluations: JsonLines
    progress: Progress
    timer: StageTimer


def roll_out(
    run: Run, policy: Params, texts: Sequence[str], metadata: Sequence[dict[str, Any]], step: int
) -> tuple[jax.Array, Rollout, list["Future[Scores]"]]:
    """Draw the B images of an iteration in micro-batches, each on its way to the scorer while the next is computed.

    Returns prompt ids i32[B, L], the rollout of all B, and the scorer's tickets.
    """
    given = run.config.rollout
    rows = np.repeat(np.arange(given.prompts), given.group_size)
    prompt_ids = run.prompt_ids([texts[row] for row in rows])
    empty_ids, key = run.empty_ids(), run.key(Stage.ROLLOUT, step)
    slices = [slice(at, at + given.micro_batch) for at in range(0, len(rows), given.micro_batch)]
    parts, decoded = [], []
    for part in slices:
        index = jax.device_put(np.arange(part.start, part.stop, dtype=np.int32), meshes.over_batch(run.mesh))
        parts.append(run.steps.rollout(policy, prompt_ids[part], empty_ids, index, key))
        decoded.append(run.steps.decode(run.vq_params, parts[-1].clean))
    tickets = [
        run.client.submit(np.asarray(images), [texts[row] for row in rows[part]], [metadata[row] for row in rows[part]])
        for part, images in zip(slices, decoded, strict=True)
    ]
    return prompt_ids, _joined(parts), tickets


def _joined(parts: Sequence[Rollout]) -> Rollout:
    if len(parts) == 1:
        return parts[0]
    clean = jnp.concatenate([part.clean for part in parts])
    if parts[0].visited is None:
        return Rollout(clean=clean)
    visited = jnp.concatenate([part.visited for part in parts], axis=1)
    return Rollout(clean, visited, jnp.concatenate([part.predicted for part in parts], axis=1))


def iterate(
    run: Run, state: TrainState, reference: Params, step: int, timer: StageTimer
) -> tuple[TrainState, Rewards, dict[str, jax.Array]]:
    """One iteration: rollout, scores, update(s). Returns the next state (the given one is used up), scores, metrics."""
    given = run.config.rollout
    texts, metadata, _ = run.train.batch(step, given.prompts, run.config.seed)
    policy = run.steps.compute_copy(state.params)
    with timer("rollout"):
        prompt_ids, rolled, tickets = roll_out(run, policy, texts, metadata, step)
    with timer("reference"):
        samples = run.steps.prepare(policy, reference, prompt_ids, rolled, run.key(Stage.STATES, step))
        jax.block_until_ready(samples)
    with timer("reward"):
        rewards = collect(tickets)
    score = jax.device_put(rewards.score.reshape(given.prompts, given.group_size), meshes.replicated(run.mesh))
    with timer("update"):
        for _ in range(run.config.grpo.updates_per_rollout):
            state, metrics = run.steps.update(state, samples, score)
        jax.block_until_ready(metrics)
    return state, rewards, metrics


def report(reports: Reports, config: RunConfig, step: int, rewards: Rewards, metrics: dict[str, jax.Array]) -> None:
    """Write one iteration's numbers; `step` counts iterations done."""
    seconds = reports.timer.take()
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    raw = {name: float(np.mean(part)) for name, part in rewards.raw.items()}
    groups = rewards.score.reshape(-1, config.rollout.group_size)
    reward = float(np.mean(rewards.score))
    line = {
        "reward": reward,
        "reward_std": float(np.std(rewards.score)),
        "dead_groups": float(np.mean(np.ptp(groups, axis=1) == 0)),
        "raw": raw,
        **values,
        "seconds": seconds,
    }
    reports.writer.write(step, line)
    shown = {"reward": reward, **raw, "kl": values["kl"], "entropy": values["entropy"]}
    reports.progress.update(shown, seconds)


def draw_samples(run: Run, reports: Reports, state: TrainState, step: int) -> None:
    """Write the sample pictures of this moment."""
    images, captions = pictures(run, run.steps.compute_copy(state.params))
    path = run.output / "pictures" / f"{step:06d}.png"
    image_grid(images, captions, 4, path)
    reports.writer.picture(step, "samples", path)


def evaluate_on_the_way(run: Run, reports: Reports, state: TrainState, position: Position) -> Position:
    """A held-out evaluation into evaluations.jsonl; keeps the best weights if asked. Returns the position."""
    given, step = run.config.evaluation, position.step
    params = _last(state)
    found = evaluate(run, run.steps.compute_copy(params), given.prompts, given.steps[0])
    reports.evaluations.append(step, found)
    means = {name: round(value, 4) for name, value in found.items() if isinstance(value, float)}
    reports.progress.message(f"held-out after {step} iterations, {given.steps[0]} steps: {means}")
    if run.config.checkpoint.keep_best and (position.best is None or found["score"] > position.best):
        position = replace(position, best=found["score"])
        run.checkpoints.save_best(step, {"params": params}, {"score": found["score"]})
    return position


def _last(state: TrainState) -> Params:
    """The weights that are judged: the moving average if there is one."""
    return state.params if state.ema is None else state.ema


def look(run: Run, reports: Reports, state: TrainState, position: Position) -> Position:
    """Draw pictures and evaluate when it is time; after the last iteration `finish` evaluates."""
    given, step = run.config.evaluation, position.step
    if given.picture_every and step % given.picture_every == 0:
        draw_samples(run, reports, state, step)
    if given.every and step % given.every == 0 and step < run.config.iterations:
        position = evaluate_on_the_way(run, reports, state, position)
    return position


def final_params(run: Run, state: TrainState) -> Params:
    """What the run ends with: the best weights if they were kept, else the moving average, else the last."""
    last = _last(state)
    best = run.checkpoints.best() if run.config.checkpoint.keep_best else None
    if best is None:
        return last
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), last)
    return restore_checkpoint(best, {"params": like})[0]["params"]


def finish(run: Run, reports: Reports, state: TrainState, reference: Params, position: Position) -> dict[str, Any]:
    """The last evaluation, the picture of before and after, the export and summary.json; returns the summary."""
    params = final_params(run, state)
    policy = run.steps.compute_copy(params)
    began = time.monotonic()
    final = evaluate_all(run, policy)
    before, captions = pictures(run, reference)
    after, _ = pictures(run, policy)
    before_after(before, after, captions, run.output / "before_after.png")
    save_folder(exported(run.checkpoint, params), run.output / "export")
    first = str(run.config.evaluation.steps[0])
    summary = {
        "iterations": position.step,
        "seconds": position.seconds + time.monotonic() - began,
        "base": position.base[first],
        "final": final[first],
        "by_steps": {steps: {"base": position.base[steps], "final": final[steps]} for steps in final},
    }
    write_json(run.output / "summary.json", summary)
    for steps, pair in summary["by_steps"].items():
        words = ", ".join(
            f"{name} {pair['base'][name]:.3f} -> {value:.3f}"
            for name, value in pair["final"].items()
            if isinstance(value, float)
        )
        reports.progress.message(f"held-out, {steps} steps: {words}")
    reports.progress.message(f"{summary['seconds']:.0f} s in all; results in {run.output}")
    return summary


def open_reports(config: RunConfig, resume_after: int | None, stack: contextlib.ExitStack) -> Reports:
    """Open the run's files and its progress bar; lines past `resume_after` (None: a fresh run) are dropped."""
    output, logging = Path(config.output_dir), config.logging
    writer = stack.enter_context(
        MetricsWriter(output, logging.tensorboard, logging.wandb, resume_after=resume_after, config=as_dict(config))
    )
    evaluations = stack.enter_context(contextlib.closing(JsonLines(output / "evaluations.jsonl", resume_after)))
    progress = stack.enter_context(contextlib.closing(Progress(config.iterations, resume_after or 0, plain_every=10)))
    return Reports(writer, evaluations, progress, StageTimer())


def train(config: RunConfig) -> dict[str, Any]:
    """Run a whole training and return its summary; raises ConfigError before anything is started."""
    validate(config)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        run, abstract = open_run(config, stack)
        state, reference, position = start(run, abstract)
        done = 0 if position is None else position.step
        reports = open_reports(config, None if position is None else done, stack)
        if position is None:
            reports.progress.message("evaluating the start model")
            position = Position(step=0, seconds=0.0, base=evaluate_all(run, reference), best=None)
        spent = position.seconds
        for step in range(done, config.iterations):
            state, rewards, metrics = iterate(run, state, reference, step, reports.timer)
            report(reports, config, step + 1, rewards, metrics)
            position = replace(position, step=step + 1, seconds=spent + time.monotonic() - began)
            position = look(run, reports, state, position)
            every = config.checkpoint.every
            if step + 1 == config.iterations or (every and (step + 1) % every == 0):
                save(run, state, reference, position)
        return finish(run, reports, state, reference, position)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status. What the user can mend is said in a line, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        print("fields and their defaults (udm_grpo/config.py says what each is):")
        print("\n".join(f"  --config.{name}={value}" for name, value in field_values(RunConfig())))
        return 0
    if "--compile_only" in words:
        return compile_only.main(words)
    try:
        train(parse(words))
    except (ConfigError, MeshError, WeightsError, CheckpointError, BridgeError, UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

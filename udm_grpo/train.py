"""Train a model by UDM-GRPO.

    python -m udm_grpo.train --config configs/shapes.py
    python -m udm_grpo.train --config configs/shapes.py:smoke --config.output_dir=outputs/try --config.seed=1
    python -m udm_grpo.train --config configs/shapes.py --config.checkpoint.resume=latest
    python -m udm_grpo.train --config configs/shapes.py --compile-only       # memory per device; see compile_only.py

An iteration (`iterate` below): prompts, rollout, images to the scorers, reference log-probabilities while they score,
advantages, update(s).
"""

from udm_grpo.lifecycle import early_signals
from udm_grpo.machine.terminal import lasting_streams, prepare_streams

if __name__ == "__main__":
    early_signals.note_signals()  # before the imports, which take seconds
    prepare_streams()

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import with_hyphens
from rewards_bridge.redaction import guarded
from udm_grpo import mesh as meshes
from udm_grpo import run_reports, shared_rewards
from udm_grpo.batches import Params, Rollout, TrainState
from udm_grpo.compile_check import compile_only
from udm_grpo.compile_check.run_settings import keep_programs, settle
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.command_line import parse, usage
from udm_grpo.configuration.config_checks import validate
from udm_grpo.devices import check_devices, device_errors, prepare
from udm_grpo.evaluation import change_in_words, evaluate_all, evaluate_during, first_sampler, pictures
from udm_grpo.export import digest_exports, export
from udm_grpo.grpo.minibatches import split_images
from udm_grpo.lifecycle import endings
from udm_grpo.lifecycle.best_weights import best_or_last, judged, save_best, take_over
from udm_grpo.lifecycle.endings import Standing
from udm_grpo.lifecycle.interruption import StopRequestedError, ignore_stopping, interruption
from udm_grpo.lifecycle.start_notes import prompt_notes, start_notes
from udm_grpo.machine.gpu_split import reserved
from udm_grpo.multihost import distributed, hosts
from udm_grpo.reporting.metrics import StageTimer, check_tools, write_json
from udm_grpo.reporting.pictures import before_after, image_grid
from udm_grpo.run import Position, Run, Stage, open_run, save, start
from udm_grpo.run_reports import Reports
from udm_grpo.scoring.evaluation_parts import remove_parts
from udm_grpo.scoring.rewards import Rewards


def roll_out(
    run: Run, policy: Params, texts: Sequence[str], step: int
) -> tuple[jax.Array, Rollout, list[tuple[int, jax.Array]]]:
    """Draw an image of each of the B texts in micro-batches, padding the last one with copies of the last text.

    Returns (prompt ids, rollout of all images, [(index of the first image, images) of each micro-batch]). Does not
    block: all results may still be computing.
    """
    sizes, key = run.steps.sizes, run.key(Stage.ROLLOUT, step)
    drawn = [*texts, *([texts[-1]] * (sizes.drawn - len(texts)))]
    empty_ids = run.empty_ids()
    parts, pictures = [], []
    for first in range(0, sizes.drawn, sizes.rollout):
        stop = first + sizes.rollout
        index = hosts.put(np.arange(first, stop, dtype=np.int32), meshes.over_batch(run.mesh))
        parts.append(run.steps.rollout(policy, run.prompt_ids(drawn[first:stop]), empty_ids, index, key))
        pictures.append((first, run.steps.decode(run.vq_params, parts[-1].clean)))
    return run.prompt_ids(drawn), _joined(parts), pictures


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
) -> tuple[TrainState, Rewards, dict[str, Any]]:
    """Run one iteration: rollout, scores, update(s). Returns (next state, scores, metrics); `state` is donated."""
    settings = run.config.rollout
    prompts, prompt_metadata, _ = run.train.batch(step, settings.prompts, run.config.seed)
    of_prompt = np.repeat(np.arange(settings.prompts), settings.group_size)
    texts, metadata = [prompts[row] for row in of_prompt], [prompt_metadata[row] for row in of_prompt]
    policy = run.steps.compute_copy(state.params, reference)
    with timer("rollout"):
        prompt_ids, rolled, pictures = roll_out(run, policy, texts, step)
        # Queued before the images are fetched, so that the devices compute while the scorers work.
        samples = run.steps.prepare(policy, reference, prompt_ids, rolled, run.key(Stage.STATES, step))
        tickets = [
            ticket
            for start, images in pictures
            for ticket in shared_rewards.submit(run.client, images, start, texts[start:], metadata[start:])
        ]
    with timer("reference"):
        jax.block_until_ready(samples)
    with timer("reward"):
        rewards = shared_rewards.collect(tickets, settings.prompts * settings.group_size)
    score = hosts.put(rewards.score.reshape(settings.prompts, settings.group_size), meshes.replicated(run.mesh))
    each: list[dict[str, jax.Array]] = []
    with timer("update"):
        for images in minibatches(run, step):
            if each:
                policy = run.steps.compute_copy(state.params, reference)
            state, metrics = run.steps.update(state, policy, samples, score, images)
            each.append(metrics)
        jax.block_until_ready(metrics)
    return state, rewards, mean_of(each)


def minibatches(run: Run, step: int) -> Iterator[jax.Array | None]:
    """Yield the image indices i32[B/M] of every optimizer step of an iteration; None for all images."""
    settings = run.config.grpo
    if settings.minibatches == 1:
        yield from [None] * settings.updates_per_rollout
        return
    for turn in range(settings.updates_per_rollout):
        key = jax.random.fold_in(run.key(Stage.MINIBATCHES, step), turn)
        for images in np.asarray(split_images(key, run.steps.sizes.images, settings.minibatches)):
            yield hosts.put(images, meshes.replicated(run.mesh))


def mean_of(each: Sequence[dict[str, jax.Array]]) -> dict[str, Any]:
    """Return the metrics of an iteration: those of its only optimizer step, or the mean over several."""
    if len(each) == 1:
        return each[0]
    steps = jax.device_get(each)
    return {name: np.mean([metrics[name] for metrics in steps], dtype=np.float32) for name in steps[0]}


def draw_samples(run: Run, reports: Reports, state: TrainState, reference: Params, step: int) -> None:
    """Draw and write the sample images of this step."""
    images, captions = pictures(run, run.steps.compute_copy(state.params, reference))
    path = run.output / "pictures" / f"{step:06d}.png"
    with run.asked.held():
        if hosts.is_primary():
            image_grid(images, captions, 4, path, run=run.identity.id)
            reports.writer.picture(step, "samples", path)


def evaluate_on_the_way(
    run: Run, reports: Reports, state: TrainState, reference: Params, position: Position
) -> Position:
    """Evaluate on held-out prompts, log to evaluations.jsonl, save the best weights if enabled; return the position."""
    step = position.step
    params = judged(state)
    policy = run.steps.compute_copy(params, reference)
    result = evaluate_during(run, policy, step)
    with run.asked.held():
        if reports.evaluations:
            reports.evaluations.append(step, result)
    means = {name: round(value, 4) for name, value in result.items() if isinstance(value, float)}
    reports.progress.message(f"held-out after {step} iterations, {first_sampler(run).name} steps: {means}")
    if run.config.checkpoint.keep_best and (position.best is None or result["score"] > position.best):
        position = replace(position, best=result["score"])
        save_best(run, step, params, result["score"])
    return position


def evaluate_start(run: Run, reports: Reports, reference: Params, position: Position) -> Position:
    """Evaluate the start model; return the position with the results."""
    reports.progress.message("evaluating the start model")
    position = replace(position, base=evaluate_all(run, reference, 0))
    with run.asked.held():
        if reports.evaluations:
            reports.evaluations.append(0, position.base[first_sampler(run).name])
    return position


def look(run: Run, reports: Reports, state: TrainState, reference: Params, position: Position) -> Position:
    """Draw sample images and evaluate if they are due; after the last iteration, `finish` evaluates instead."""
    settings, step = run.config.evaluation, position.step
    if step == 0:
        position = evaluate_start(run, reports, reference, position)
    if settings.picture_every and step % settings.picture_every == 0:
        draw_samples(run, reports, state, reference, step)
    if settings.every and step and step % settings.every == 0 and step < run.config.iterations:
        position = evaluate_on_the_way(run, reports, state, reference, position)
    if jax.process_count() > 1:
        run.asked.check()  # if writing failed, this is repeated after a resume
    return replace(position, looked=True)


def finish(run: Run, reports: Reports, state: TrainState, reference: Params, position: Position) -> dict[str, Any]:
    """Run the last evaluation, write before_after.png, the export and summary.json; return the summary."""
    run.checkpoints.finish()
    params = best_or_last(run, state, position)
    policy = run.steps.compute_copy(params, reference)
    began = time.monotonic()
    final = evaluate_all(run, policy, position.step)
    before, captions = pictures(run, reference)
    after, _ = pictures(run, policy)
    export(run, state, params, reference)
    first = first_sampler(run).name
    exports = hosts.from_primary(lambda: digest_exports(run.output))
    summary = {
        "run": run.identity.id,
        "iterations": position.step,
        "seconds": position.seconds + time.monotonic() - began,
        "base": position.base[first],
        "final": final[first],
        "by_steps": {steps: {"base": position.base[steps], "final": final[steps]} for steps in final},
        "exports": exports,
    }
    if hosts.is_primary():
        before_after(before, after, captions, run.output / "before_after.png", run=run.identity.id)
        write_json(run.output / "summary.json", summary)
        remove_parts(run.output)
    for steps, pair in summary["by_steps"].items():
        reports.progress.message(f"held-out, {steps} steps: {change_in_words(**pair)}")
    if reports.signal.skipped:
        reports.progress.message(
            f"{reports.signal.skipped} iterations made no update, because all their groups were dead (see the report)"
        )
    reports.progress.message(f"{summary['seconds']:.0f} s in all; results in {run.config.output_dir}")
    return summary


def train(config: RunConfig) -> dict[str, Any]:
    """Run a complete training and return its summary; raises ConfigError before anything is started.

    Raises DivergedError at the first iteration with a number that is not finite, before any of it is saved.

    SIGTERM ends it after the current iteration or evaluation batch, with everything saved that a resume needs;
    interruption.py lists the other signals. With several processes, all must call this inside `distributed.joined`.
    """
    validate(config)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(interruption())
        placed, lines = stack.enter_context(reserved(config.rewards))
        config = replace(config, rewards=placed)
        print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
        check_devices()
        if hosts.is_primary():
            check_tools(config.logging)
        try:
            run, abstract = open_run(config, asked, stack, partial(settle, stack))
            state, reference, position = start(run, abstract)
            asked.check()
        except StopRequestedError:
            return endings.stopped_early(asked)
        notes = start_notes(run.config, run.released.transformer_config, run.released.transformer, run.mesh)
        run = take_over(run, abstract, position, stack)
        keep_programs(config, stack)
        reports = run_reports.open_reports(run, position, stack)
        for note in [*notes, *prompt_notes(run)]:
            reports.progress.message(note)
        position = position or Position(step=0, seconds=0.0, base={}, best=None, looked=False)
        standing = Standing(state, position, hosts.from_primary(run.checkpoints.latest))
        del state  # `standing` holds the only reference, so that updates can donate it
        try:
            summary = advance(run, reports, reference, standing, began)
        except StopRequestedError:
            return endings.stop(run, reports, reference, standing)
        except Exception as error:
            endings.save_after(error, run, reports, reference, standing)
            raise
        if hosts.is_primary():
            run_reports.write_page(reports, run.output)
        return summary


def advance(run: Run, reports: Reports, reference: Params, standing: Standing, began: float) -> dict[str, Any]:
    """Run the remaining iterations and `finish`; return the summary.

    began: time of this start. Raises StopRequestedError once the run is asked to stop and `standing` can be saved.
    """
    config, spent = run.config, standing.position.seconds
    if not standing.position.looked:
        standing.position = look(run, reports, standing.state, reference, standing.position)
    for step in range(standing.position.step, config.iterations):
        run.asked.check()
        standing.state, rewards, metrics = iterate(run, standing.state, reference, step, reports.timer)
        seconds = spent + time.monotonic() - began
        standing.position = replace(standing.position, step=step + 1, seconds=seconds, looked=False)
        numbers = run_reports.numbers_of(rewards, metrics)
        with run.asked.held():
            run_reports.write_iteration(reports, config, step + 1, rewards, numbers)
            if run.mirror:
                run.mirror.push_when_due()
        run_reports.check_diverged(config, step + 1, numbers)
        run.asked.check()
        standing.position = look(run, reports, standing.state, reference, standing.position)
        every = config.checkpoint.every
        if step + 1 == config.iterations or (every and (step + 1) % every == 0):
            save(run, standing.state, reference, standing.position)
            standing.saved = step + 1
    return finish(run, reports, standing.state, reference, standing.position)


def _help(words: Sequence[str]) -> int:
    try:
        fields = usage(words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(__doc__)
    print("The fields, each with its value: the default, or the value in the file that --config names.\n")
    print(fields)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status. User errors are reported in one line, without a traceback."""
    prepare()
    with lasting_streams():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    stopped_by = early_signals.heard()
    words = with_hyphens(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        return _help(words)
    if "--compile-only" in words:
        return compile_only.main(words)
    expected = (UserError, OSError)
    try:
        config = parse(words)
        validate(config)
        if stopped_by:
            print(f"stopped by {stopped_by} before anything was started", file=sys.stderr)
            return config.checkpoint.stopped_status
        with distributed.joined(config.distributed, expected), device_errors():
            summary = train(config)
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    return config.checkpoint.stopped_status if summary.get("stopped") else 0


if __name__ == "__main__":
    status = guarded(main)
    ignore_stopping()
    sys.exit(status)

"""Held-out evaluation and sample images, drawn from the same noise each time."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rewards_bridge.composition import apart
from udm_grpo import mesh as meshes
from udm_grpo import shared_rewards
from udm_grpo.batches import Params
from udm_grpo.config import EvaluationConfig
from udm_grpo.files.atomic import replace_file
from udm_grpo.lifecycle.interruption import StopRequestedError
from udm_grpo.multihost import hosts
from udm_grpo.reporting.extremes import Extremes
from udm_grpo.reporting.raw_values import means, missing
from udm_grpo.run import Run, Stage
from udm_grpo.scoring.evaluation_parts import Part, part_file, read_part, write_part
from udm_grpo.scoring.rewards import Rewards

COLUMNS = ("score", "tags", "prompts", "images", "missing", "step", "run", "nonfinite")
"""Reserved names in the result of an evaluation and in its line in evaluations.jsonl."""


@dataclass(frozen=True)
class Drawn:
    """A micro-batch of images and the prompts that they are of."""

    images: jax.Array
    """u8[batch, H, W, 3]; the tail of the last micro-batch may be padding."""
    first: int
    """Index of the first image among all."""
    rows: np.ndarray
    """Index of the prompt of each image, without padding."""


@dataclass(frozen=True)
class Sampler:
    """How the images of an evaluation are drawn."""

    steps: int
    """T."""
    guidance_scale: float = 1.0
    """g; 1: CFG-free."""

    @property
    def name(self) -> str:
        """Return its name in by_steps of summary.json and in the names of files: "10", or "10-guidance-3"."""
        return f"{self.steps}" + (f"-guidance-{self.guidance_scale:g}" if self.guidance_scale > 1 else "")


@dataclass(frozen=True)
class EvaluationFiles:
    """Files that an evaluation writes; None: it is not written."""

    extremes: Path | None = None
    """The best and the worst images among those that process 0 scores (PNG)."""
    scores: Path | None = None
    """The scores of every prompt (JSON lines)."""


def samplers(settings: EvaluationConfig) -> list[Sampler]:
    """Return the samplers of the first and the last evaluation."""
    return [Sampler(steps, scale) for scale in settings.guidance_scales for steps in settings.steps]


def first_sampler(run: Run) -> Sampler:
    """Return the sampler of evaluations during training, of pictures, and of base and final in summary.json."""
    return samplers(run.config.evaluation)[0]


def draw(
    run: Run, policy: Params, texts: Sequence[str], copies: int, sampler: Sampler, first: int = 0
) -> Iterator[Drawn]:
    """Yield `copies` images of every prompt, prompt-major, always from the same noise.

    first: index of the first image to draw; those before it are skipped.
    """
    rollout = run.steps.rollout_in(sampler.steps, sampler.guidance_scale)
    batch = run.steps.sizes.evaluation
    of_image = np.repeat(np.arange(len(texts)), copies)
    padded = np.pad(of_image, (0, (first - len(of_image)) % batch), mode="edge")
    for at in range(first, len(padded), batch):
        rows = padded[at : at + batch]
        index = hosts.put(np.arange(at, at + batch, dtype=np.int32), meshes.over_batch(run.mesh))
        prompt_ids = run.prompt_ids([texts[row] for row in rows])
        rolled = rollout(policy, prompt_ids, run.empty_ids(), index, run.key(Stage.EVALUATION, 0))
        yield Drawn(run.steps.decode(run.vq_params, rolled.clean), at, rows[: len(of_image) - at])


def evaluate(
    run: Run, policy: Params, count: int, sampler: Sampler, step: int, files: EvaluationFiles = EvaluationFiles()
) -> dict[str, Any]:
    """Return means over `count` held-out prompts (or all, if there are fewer) after `step` iterations, tag-balanced.

    {"score": total reward, each raw score by its name, "tags": {tag: the same}, "prompts", "images"}. Raw values whose
    names are in COLUMNS are prefixed with "raw/". A value that some images lack is the mean over the others, and
    "missing" gives the number of images that lack it, by name.

    Raises StopRequestedError if the run is asked to stop before all images are drawn, and what a scorer raised. Images
    scored by then are saved (see evaluation_parts.py), and the same evaluation continues after them.
    """
    texts, metadata, indices = run.heldout.fixed(min(count, len(run.heldout)), run.config.seed)
    copies = run.config.evaluation.images_per_prompt
    total = len(texts) * copies
    most = run.config.evaluation.extremes if files.extremes else 0
    identity = {"sampler": sampler.name, "prompts": len(texts), "copies": copies, "extremes": most}
    parts = Parts(run, step, identity)
    known = parts.read()
    kept = Extremes(most if hosts.is_primary() else 0, total, known.done, known.best, known.worst)
    tickets: list[shared_rewards.Ticket] = []
    end = known.done
    drawing = draw(run, policy, texts, copies, sampler, end) if end < total else iter(())
    stopped = end < total and hosts.any_process(run.asked.requested)
    while end < total and not stopped:
        drawn = next(drawing)
        batch_texts, batch_metadata = [texts[row] for row in drawn.rows], [metadata[row] for row in drawn.rows]
        for ticket in shared_rewards.submit(run.client, drawn.images, drawn.first, batch_texts, batch_metadata):
            mine = ticket.rows - drawn.first
            kept.watch(hosts.take(drawn.images, mine), [batch_texts[row] for row in mine], ticket.scores)
            tickets.append(ticket)
        end += len(drawn.rows)
        stopped = end < total and hosts.any_process(run.asked.requested or shared_rewards.failed(tickets))
    columns = parts.collect(known, tickets, end, kept)
    if stopped:
        raise StopRequestedError
    with run.asked.held():
        if files.extremes and hosts.is_primary():
            kept.write(files.extremes, run.identity.id)
        if files.scores and hosts.is_primary():
            write_scores(files.scores, run, indices, columns)
    return summarize(columns, [run.heldout.tags[index] for index in indices], copies)


def write_scores(file: Path, run: Run, indices: Iterable[int], columns: Mapping[str, np.ndarray]) -> None:
    """Write a line per prompt: {"run", "prompt", "tag", "scores": {name: [of each image]}}, with the total as "score".

    A value that an image lacks is null.
    """
    heldout, copies, lines = run.heldout, run.config.evaluation.images_per_prompt, []
    for row, index in enumerate(indices):
        own = {name: values[row * copies : (row + 1) * copies].tolist() for name, values in columns.items()}
        scores = {name: [None if value != value else value for value in values] for name, values in own.items()}
        line = {"run": run.identity.id, "prompt": heldout.prompts[index], "tag": heldout.tags[index], "scores": scores}
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    replace_file(file, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))


def summarize(columns: Mapping[str, np.ndarray], prompt_tags: Sequence[str], copies: int) -> dict[str, Any]:
    """Return the result of `evaluate` from f32[prompts * copies] by name, prompt-major, and the tag of each prompt."""
    raw = {name: values for name, values in columns.items() if name != "score"}
    scores = {"score": columns["score"], **apart(raw, COLUMNS)}
    tags = np.repeat(prompt_tags, copies)
    result: dict[str, Any] = {**means(scores)}
    result["tags"] = {
        str(tag): means({name: values[tags == tag] for name, values in scores.items()}) for tag in sorted(set(tags))
    }
    lacking = missing(scores)
    return {**result, "prompts": len(prompt_tags), "images": len(tags)} | ({"missing": lacking} if lacking else {})


@dataclass(frozen=True)
class Parts:
    """The finished part of one evaluation of a run, read and written by process 0."""

    run: Run
    step: int
    """Completed iterations."""
    identity: dict[str, Any]
    """What identifies this evaluation in addition to the run's fingerprint."""

    def read(self) -> Part:
        """Return the part that an earlier start has finished; only process 0 gets its images."""
        part = read_part(self._file(), self._identity()) if hosts.is_primary() else Part()
        shared = hosts.from_primary(lambda: {name: values.tolist() for name, values in part.columns.items()})
        return replace(part, columns={name: np.asarray(values, np.float32) for name, values in shared.items()})

    def collect(
        self, known: Part, tickets: Sequence[shared_rewards.Ticket], end: int, kept: Extremes
    ) -> dict[str, np.ndarray]:
        """Return f32[end] by name, of the known images and those of the tickets, and write all of it.

        Raises what a scorer raised, after writing everything before its batch (with one process).
        """
        if end == known.done:
            return known.columns
        try:
            scored = shared_rewards.collect(tickets, end - known.done, known.done)
        except Exception:
            whole = list(itertools.takewhile(lambda ticket: ticket.scores.exception() is None, tickets))
            if whole and jax.process_count() == 1:
                end = int(whole[-1].rows[-1]) + 1
                scored = shared_rewards.collect(whole, end - known.done, known.done)
                self._write(joined(known, scored), kept)
            raise
        columns = joined(known, scored)
        self._write(columns, kept)
        return columns

    def _write(self, columns: dict[str, np.ndarray], kept: Extremes) -> None:
        with self.run.asked.held():
            if hosts.is_primary():
                write_part(self._file(), self._identity(), Part(columns, *kept.so_far()))

    def _file(self) -> Path:
        return part_file(self.run.output, self.step, self.identity["sampler"])

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.run.identity.fingerprint, "step": self.step, **self.identity}


def joined(known: Part, scored: Rewards) -> dict[str, np.ndarray]:
    """Return columns by name, of the known images followed by the newly scored ones."""
    columns = {"score": scored.score, **apart(scored.raw, ("score",))}
    if not known.done:
        return columns
    counts = known.done, len(scored.score)
    sides = [
        [side.get(name, np.full(count, np.nan, np.float32)) for name in {**known.columns, **columns}]
        for side, count in zip((known.columns, columns), counts, strict=True)
    ]  # a raw value that some images lack is NaN there
    return {name: np.concatenate(pair) for name, *pair in zip({**known.columns, **columns}, *sides, strict=True)}


def pictures(run: Run, policy: Params) -> tuple[np.ndarray, list[str]]:
    """Return (u8[n, H, W, 3], captions): one image of each of the first held-out prompts, always from the same noise.

    Raises StopRequestedError if the run is asked to stop before they are drawn.
    """
    run.asked.check()
    count = min(run.config.evaluation.picture_prompts, len(run.heldout))
    texts, _, _ = run.heldout.fixed(count, run.config.seed)
    drawing = draw(run, policy, texts, 1, first_sampler(run))
    images = np.concatenate([hosts.whole(drawn.images) for drawn in drawing])
    return images[:count], list(texts)


def extremes_file(run: Run, step: int) -> Path:
    """Return the file for the best and the worst images of the evaluation after `step` iterations."""
    return run.output / "extremes" / f"{step:06d}.png"


def evaluate_during(run: Run, policy: Params, step: int) -> dict[str, Any]:
    """Return the evaluation after `step` iterations, during training: on evaluation.prompts, with the first sampler."""
    files = EvaluationFiles(extremes_file(run, step))
    return evaluate(run, policy, run.config.evaluation.prompts, first_sampler(run), step, files)


def evaluate_all(run: Run, policy: Params, step: int) -> dict[str, Any]:
    """Return the evaluation for the start and the end of a run, by the names of its samplers.

    The best and the worst images are those of the first sampler; the scores of every prompt are written for each.
    """
    results: dict[str, Any] = {}
    for sampler in samplers(run.config.evaluation):
        scores = run.output / "heldout_scores" / f"{step:06d}-{sampler.name}.jsonl"
        files = EvaluationFiles(None if results else extremes_file(run, step), scores)
        results[sampler.name] = evaluate(run, policy, run.config.evaluation.final_prompts, sampler, step, files)
    return results


def change_in_words(base: dict[str, Any], final: dict[str, Any]) -> str:
    """Return every mean of two evaluations, such as "strict 0.125 -> 0.250", with a dash if one of them lacks it."""
    names = [name for name, value in {**base, **final}.items() if isinstance(value, float)]
    pairs = {name: ["-" if name not in side else f"{side[name]:.3f}" for side in (base, final)] for name in names}
    return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in pairs.items())

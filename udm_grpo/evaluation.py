"""Held-out evaluation and sample pictures, drawn from the same noise each time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rewards_bridge.composition import apart
from udm_grpo import hosts, shared_rewards
from udm_grpo import mesh as meshes
from udm_grpo.batches import Params
from udm_grpo.host.extremes import Extremes
from udm_grpo.host.raw_values import means, missing
from udm_grpo.run import Run, Stage

COLUMNS = ("score", "tags", "prompts", "images", "missing", "step", "run", "nonfinite")
"""Names that an evaluation, and its line in evaluations.jsonl, has of its own."""


@dataclass(frozen=True)
class Drawn:
    """A micro-batch of pictures and what they were asked to show."""

    images: jax.Array
    """u8[batch, H, W, 3]; of the last micro-batch the tail may be padding."""
    first: int
    """The number of the first of them among all."""
    rows: np.ndarray
    """Which of the prompts each picture is of, without padding."""


def draw(run: Run, policy: Params, texts: Sequence[str], copies: int, steps: int) -> Iterator[Drawn]:
    """`copies` pictures of every prompt in `steps` steps, prompt-major; CFG-free and from the same noise each time."""
    rollout = run.steps.rollout_in(steps)
    batch = run.steps.sizes.evaluation
    wanted = np.repeat(np.arange(len(texts)), copies)
    padded = np.pad(wanted, (0, -len(wanted) % batch), mode="edge")
    for at in range(0, len(padded), batch):
        rows = padded[at : at + batch]
        index = hosts.put(np.arange(at, at + batch, dtype=np.int32), meshes.over_batch(run.mesh))
        prompt_ids = run.prompt_ids([texts[row] for row in rows])
        rolled = rollout(policy, prompt_ids, run.empty_ids(), index, run.key(Stage.EVALUATION, 0))
        yield Drawn(run.steps.decode(run.vq_params, rolled.clean), at, rows[: len(wanted) - at])


def evaluate(run: Run, policy: Params, count: int, steps: int, extremes: Path | None = None) -> dict[str, Any]:
    """Means over `count` held-out prompts (all, if there are fewer), balanced over tags.

    {"score": what is optimised, each raw score by its name, "tags": {tag: the same}, "prompts", "images"}. A raw value
    whose name is one of COLUMNS has "raw/" before it. A value that some images lack is the mean over the others, and
    "missing" then says how many lack it: {name: images}.
    extremes: the file for the best and the worst of the images, of those that process 0 scores.
    """
    texts, metadata, indices = run.heldout.fixed(min(count, len(run.heldout)), run.config.seed)
    copies = run.config.evaluation.images_per_prompt
    total = len(texts) * copies
    tickets: list[shared_rewards.Ticket] = []
    kept = Extremes(run.config.evaluation.extremes if extremes and hosts.is_primary() else 0, total)
    for drawn in draw(run, policy, texts, copies, steps):
        asked, about = [texts[row] for row in drawn.rows], [metadata[row] for row in drawn.rows]
        for ticket in shared_rewards.submit(run.client, drawn.images, drawn.first, asked, about):
            mine = ticket.rows - drawn.first
            kept.watch(hosts.take(drawn.images, mine), [asked[row] for row in mine], ticket.scores)
            tickets.append(ticket)
    if extremes and hosts.is_primary():
        kept.write(extremes, run.identity.id)
    rewards = shared_rewards.collect(tickets, total)
    parts = {"score": rewards.score, **apart(rewards.raw, COLUMNS)}
    tags = np.repeat([run.heldout.tags[index] for index in indices], copies)
    result: dict[str, Any] = {**means(parts)}
    result["tags"] = {
        str(tag): means({name: values[tags == tag] for name, values in parts.items()}) for tag in sorted(set(tags))
    }
    lacking = missing(parts)
    return {**result, "prompts": len(texts), "images": len(tags)} | ({"missing": lacking} if lacking else {})


def pictures(run: Run, policy: Params) -> tuple[np.ndarray, list[str]]:
    """(u8[n, H, W, 3], captions): one picture of each of the first held-out prompts, always from the same noise."""
    count = min(run.config.evaluation.picture_prompts, len(run.heldout))
    texts, _, _ = run.heldout.fixed(count, run.config.seed)
    steps = run.config.evaluation.steps[0]
    images = np.concatenate([hosts.whole(drawn.images) for drawn in draw(run, policy, texts, 1, steps)])
    return images[:count], list(texts)


def extremes_file(run: Run, step: int) -> Path:
    """Where the best and the worst images of the evaluation after `step` iterations go."""
    return run.output / "extremes" / f"{step:06d}.png"


def evaluate_all(run: Run, policy: Params, step: int) -> dict[str, Any]:
    """The evaluation at the start and the end: at every number of steps in evaluation.steps, by that number.

    The best and the worst images are those at the first number of steps.
    """
    given, file = run.config.evaluation, extremes_file(run, step)
    return {
        str(steps): evaluate(run, policy, given.final_prompts, steps, file if steps == given.steps[0] else None)
        for steps in given.steps
    }


def change_in_words(base: dict[str, Any], final: dict[str, Any]) -> str:
    """Return every mean of two evaluations as in "strict 0.125 -> 0.250", with a dash where only one of them has it."""
    names = [name for name, value in {**base, **final}.items() if isinstance(value, float)]
    pairs = {name: ["-" if name not in side else f"{side[name]:.3f}" for side in (base, final)] for name in names}
    return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in pairs.items())

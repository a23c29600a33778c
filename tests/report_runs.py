"""Small run folders, written by the code that writes them in a real run."""

import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from rewards_bridge.scorers.base import Scores
from udm_grpo.config import RunConfig, as_dict
from udm_grpo.reporting.environment import begin
from udm_grpo.reporting.extremes import Extremes
from udm_grpo.reporting.metrics import JsonLines, MetricsWriter, write_json
from udm_grpo.reporting.pictures import before_after, image_grid

TAGS = ("colors", "counting", "position")
MARKUP = "</script><script>window.broken=1</script><img src=x onerror=window.broken=1> & <b>bold</b>"
"""A prompt that must reach the page as text."""
PROMPTS = ("a photo of a red circle", "a photo of three stars", MARKUP, "ein Foto von Ähren und 日本語")


def write_run(
    output: Path,
    *,
    iterations: int = 12,
    planned: int = 12,
    every: int = 4,
    seed: int = 0,
    side: int = 32,
    run: str = "",
) -> Path:
    """Write a run of `planned` iterations, `iterations` of them done; `side`: pixels of its pictures; `run`: its id."""
    config = RunConfig(output_dir=str(output), iterations=planned, seed=seed)
    config.rewards.scorers["shapes"].options = {"api_key": "sesame"}
    output.mkdir(parents=True)
    stamp = {"run": run} if run else {}
    write_json(output / "config.json", {**stamp, **as_dict(config)})
    begin(output, None, run)
    rng = np.random.default_rng(seed)
    with MetricsWriter(output, run=run) as metrics:
        evaluations = JsonLines(output / "evaluations.jsonl", run=run)
        evaluations.append(0, evaluation(0, planned, 12))
        _pictures(output, 0, side, seed, run)
        for step in range(1, iterations + 1):
            metrics.write(step, _line(step / planned, rng))
            if step % every == 0:
                _pictures(output, step, side, seed, run)
                if step < planned:
                    evaluations.append(step, evaluation(step, planned, 6))
        evaluations.close()
    if iterations == planned:
        pairs = {"base": evaluation(0, planned, 12), "final": evaluation(planned, planned, 12)}
        by_steps = {"10": pairs, "25": pairs}
        said = {**stamp, "iterations": planned, "seconds": 754.2, **pairs, "by_steps": by_steps}
        write_json(output / "summary.json", said)
        images = [_images(step, side, seed) for step in (0, planned)]
        before_after(images[0], images[1], PROMPTS, output / "before_after.png", run=run)
    return output


def evaluation(step: int, planned: int, prompts: int) -> dict[str, Any]:
    """Return scores that rise from 0.5 towards 1, at another rate for each tag."""
    tags = {}
    for place, tag in enumerate(TAGS):
        value = 1 - 0.5 * math.exp(-(place + 1) * step / planned)
        tags[tag] = {"score": value, "strict": value - 0.1}
    means = {name: sum(tag[name] for tag in tags.values()) / len(tags) for name in ("score", "strict")}
    return {**means, "tags": tags, "prompts": prompts, "images": 4 * prompts}


def _line(done: float, rng: np.random.Generator) -> dict[str, Any]:
    noise = rng.normal(0, 0.04, 4)
    reward = 1 - 0.5 * math.exp(-3 * done) + noise[0]
    seconds = {"rollout": 1.1 + noise[1], "reference": 0.2, "reward": 0.05, "update": 1.6 + noise[2]}
    if done < 0.01 or done == 1 / 12:
        seconds["update"] = 14.0  # compiling
    return {
        "reward": reward,
        "raw": {"strict": reward - 0.1},
        "kl": 0.02 * done + abs(noise[3]) / 10,
        "entropy": 2.5 - done,
        "grad_norm": 0.6 + abs(noise[1]),
        "loss": noise[2],
        "seconds": seconds,
    }


def _images(step: int, side: int, seed: int) -> np.ndarray:
    """Return one picture per prompt, the same at every step except for brightness, 40 + 10 per step (at most 240)."""
    rows, columns = np.mgrid[:side, :side] / side
    images = np.zeros((len(PROMPTS), side, side, 3), np.uint8)
    for i in range(len(PROMPTS)):
        inside = (rows - 0.5) ** 2 + (columns - 0.3 - 0.1 * i) ** 2 < 0.08
        images[i] = np.where(inside[..., None], min(240, 40 + 10 * step), (30 * i, 60 + 20 * seed, 110))
    return images


def _pictures(output: Path, step: int, side: int, seed: int, run: str) -> None:
    images = _images(step, side, seed)
    image_grid(images, PROMPTS, 4, output / "pictures" / f"{step:06d}.png", run=run)
    kept = Extremes(2, len(images))
    ticket: Future[Scores] = Future()
    score = np.linspace(0.25, 1, len(images)).astype(np.float32)
    reasons = ['expected 1 circle, found <0> & "none"', "", "two <i>squares</i>", ""]
    ticket.set_result(Scores(score, {"strict": np.round(score)}, reasons))
    kept.watch(images, PROMPTS, ticket)
    kept.write(output / "extremes" / f"{step:06d}.png", run)

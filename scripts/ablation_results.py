"""Results of scripts/ablation.py so far: finished and unfinished runs, means, spreads, intervals, times to a score.

Means are over seeds and held-out prompts, each with all its images. The spread is the standard deviation between seeds.
An interval is the middle 95 % over resamples of both the seeds and the prompts, drawn independently of each other; a
prompt is drawn for all seeds together, since all of them draw images of the same prompts. With one seed it is over the
prompts only. The mean of the tags resamples the prompts of each tag by themselves.

Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; Owen 2007, "The pigeonhole bootstrap".
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from scripts.ablation_runs import SCORE, Plan, read_failures, read_sweep, run_name
from scripts.ablation_settings import Setting, forward_passes
from udm_grpo.evaluation import samplers
from udm_grpo.reporting.run_folder import RunFolder, RunFolderError, read_run
from udm_grpo.scoring.score_summary import groups, interval

LEVEL = 0.9
"""Held-out score whose first time is reported."""
RESAMPLES = 4000
LAST = 10
"""Iterations over which values at the end of a run are averaged."""


@dataclass(frozen=True)
class PromptScores:
    """Strict scores of held-out prompts, means over the images of each."""

    prompts: tuple[str, ...]
    tags: tuple[str, ...]
    values: np.ndarray
    """f64[S, P], a row per seed."""

    def by_seed(self) -> Float[np.ndarray, " S"]:
        """Return the mean over prompts of each seed."""
        return self.values.mean(axis=1)

    def tags_by_seed(self) -> Float[np.ndarray, " S"]:
        """Return the mean over the tags of each seed."""
        return np.mean([self.values[:, rows].mean(axis=1) for rows in groups(self.tags).values()], axis=0)


@dataclass(frozen=True)
class Reached:
    """What a run took until a held-out evaluation first reached LEVEL."""

    iterations: int
    passes: float
    """Forward passes of one image; see ablation_settings.py."""
    seconds: float
    """Of its iterations, without evaluations."""


@dataclass(frozen=True)
class RunResult:
    """A run so far."""

    seed: int
    folder: RunFolder
    passes: float
    """Forward passes of an iteration, of all of its images."""

    @property
    def finished(self) -> bool:
        """Return whether it has ended."""
        return self.folder.summary is not None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return (iteration, value) of a metric, or of the held-out score for `heldout`."""
        lines, key = (self.folder.evaluations, SCORE) if name == "heldout" else (self.folder.metrics, name)
        return [(line["step"], line[key]) for line in lines if line.get(key) is not None]

    def reached(self, level: float = LEVEL) -> Reached | None:
        """Return what the run took until a held-out evaluation during training; None if none has reached the level."""
        step = next((step for step, score in self.curve("heldout") if score >= level), None)
        if step is None:
            return None
        seconds = sum(sum(line["seconds"].values()) for line in self.folder.metrics if line["step"] <= step)
        return Reached(step, step * self.passes, seconds)

    def largest(self, name: str) -> float | None:
        """Return the largest value of a curve."""
        return max((value for _, value in self.curve(name)), default=None)

    def last(self, name: str) -> float | None:
        """Return the mean of the last values of a curve."""
        values = [value for _, value in self.curve(name)[-LAST:]]
        return float(np.mean(values)) if values else None

    def seconds(self) -> float | None:
        """Return the median seconds of an iteration."""
        times = [sum(line["seconds"].values()) for line in self.folder.metrics]
        return float(np.median(times)) if times else None


@dataclass(frozen=True)
class SettingResult:
    """A setting's runs so far."""

    name: str
    setting: Setting
    iterations: int
    passes: int
    """Forward passes of an iteration for each image."""
    rate: float | None
    trained: str
    """Name of the sampler that draws as in training; see evaluation.py."""
    free: str
    """Name of the same sampler without guidance."""
    runs: tuple[RunResult, ...]

    def finished(self) -> list[RunResult]:
        """Return the finished runs."""
        return [run for run in self.runs if run.finished]

    def scores(self, sampler: str) -> PromptScores | None:
        """Return the final scores of the finished runs with a sampler; None if there are none."""
        return joined([read_scores(run.folder, sampler) for run in self.finished()])


@dataclass(frozen=True)
class Results:
    """Everything that the page shows."""

    settings: tuple[SettingResult, ...]
    seeds: int
    iterations: int
    sweep: Mapping[str, Any]
    failures: Mapping[str, Any]
    unreadable: tuple[str, ...]
    """Runs whose folders cannot be read."""

    def bases(self) -> dict[str, float]:
        """Return the start model's score, from a finished run, by the names of the samplers that settings draw with."""
        scores: dict[str, float] = {}
        for one in self.settings:
            for summary in [run.folder.summary for run in one.finished() if run.folder.summary]:
                for sampler in (one.free, one.trained):
                    if sampler in summary["by_steps"]:
                        scores.setdefault(sampler, summary["by_steps"][sampler]["base"][SCORE])
        return scores


def read_results(plan: Plan) -> Results:
    """Read all runs of a plan."""
    sweep, unreadable, results = read_sweep(plan), list[str](), []
    for name, setting in plan.settings.items():
        config = plan.configs[name]
        trained = samplers(config.evaluation)[0]
        passes, images = forward_passes(config), config.rollout.prompts * config.rollout.group_size
        runs = []
        for seed in range(plan.seeds):
            path = plan.folder / "runs" / run_name(name, seed)
            if not (path / "metrics.jsonl").is_file():
                continue
            try:
                folder = read_run(path)
            except RunFolderError as error:
                print(f"warning: {error}", file=sys.stderr)
                unreadable.append(path.name)
                continue
            done = folder.summary is None or folder.summary.get("iterations") == config.iterations
            runs.append(RunResult(seed, folder if done else replace(folder, summary=None), float(passes * images)))
        results.append(
            SettingResult(
                name=name,
                setting=setting,
                iterations=config.iterations,
                passes=passes,
                rate=sweep["settings"][plan.sweep_of(name)]["chosen"],
                trained=trained.name,
                free=replace(trained, guidance_scale=1.0).name,
                runs=tuple(runs),
            )
        )
    failures = read_failures(plan.folder)
    return Results(tuple(results), plan.seeds, plan.iterations, sweep, failures, tuple(unreadable))


def read_scores(run: RunFolder, sampler: str) -> dict[str, tuple[str, float]]:
    """Return {prompt: (tag, strict score)} of a run's last evaluation; empty if the run has no such file."""
    file: Path = run.path / "heldout_scores" / f"{run.last:06d}-{sampler}.jsonl"
    if not file.is_file():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["prompt"]: (line["tag"], float(np.mean(line["scores"][SCORE]))) for line in lines}


def joined(runs: Sequence[Mapping[str, tuple[str, float]]]) -> PromptScores | None:
    """Return the scores of several seeds on the prompts that all of them have; None if there are none."""
    prompts = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not prompts:
        return None
    values = np.array([[run[prompt][1] for prompt in prompts] for run in runs])
    return PromptScores(tuple(prompts), tuple(runs[0][prompt][0] for prompt in prompts), values)


def resampled(scores: PromptScores, tags: bool, setting: int, seed: int = 0) -> Float[np.ndarray, " R1"]:
    """Return the mean and, after it, those of RESAMPLES resamples of seeds and prompts.

    tags: the mean of the tags' means instead. The prompts that are drawn depend on `seed` only, so that two settings
    can be compared; the seeds that are drawn depend on the number of the setting, too.
    """
    count = len(scores.values)
    drawn = np.random.default_rng((seed, 1, setting)).multinomial(count, [1 / count] * count, size=RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), drawn]) / count
    parts = groups(scores.tags).values() if tags else [np.arange(len(scores.prompts))]
    rng = np.random.default_rng((seed, 0))
    means = []
    for rows in parts:
        size = len(rows)
        often = np.concatenate([np.ones((1, size)), rng.multinomial(size, [1 / size] * size, size=RESAMPLES)]) / size
        means.append(((weights @ scores.values[:, rows]) * often).sum(axis=1))
    return np.mean(means, axis=0)


def mean_interval(scores: PromptScores, tags: bool, setting: int) -> dict[str, Any]:
    """Return {"value", "low", "high", "spread"}; low, high and spread are None where there is nothing to resample."""
    seeds = scores.tags_by_seed() if tags else scores.by_seed()
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return {**interval(resampled(scores, tags, setting), len(scores.prompts)), "spread": spread}


def difference(one: PromptScores, other: PromptScores, settings: tuple[int, int]) -> dict[str, Any]:
    """Return {"value", "low", "high"} of other - one, on the prompts that both have."""
    both = sorted(set(one.prompts) & set(other.prompts))
    sides = [
        PromptScores(
            tuple(both),
            tuple(scores.tags[scores.prompts.index(prompt)] for prompt in both),
            scores.values[:, [scores.prompts.index(prompt) for prompt in both]],
        )
        for scores in (one, other)
    ]
    before, after = (resampled(scores, False, number) for scores, number in zip(sides, settings, strict=True))
    return interval(after - before, len(both))

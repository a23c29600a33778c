"""The page of scripts/ablation.py: tables, curves and pictures of the runs so far, as Markdown with files beside it."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.ablation_chart import COLORS, chart, mean_curve
from scripts.ablation_results import LEVEL, Results, RunResult, difference, mean_interval
from scripts.ablation_runs import SCORE
from scripts.ablation_settings import PUBLISHED
from udm_grpo.files.atomic import replace_file

CURVES = {
    "heldout": f"held-out {SCORE} score during training, drawn as in training",
    "reward": "reward of the training images",
    "kl": "KL to the start model on the trained states",
    "entropy": "entropy of the model at the trained tokens",
}
NONE = "-"
HEAD = """# Ablation of UDM-GRPO on the shapes world

Written by `python -m scripts.ablation`; scripts/ablation_settings.py has the settings. {iterations} iterations
({fewer}), {seeds} seeds, {finished} of {total} runs finished. Scores are the share of held-out images that are right
in every object, count, colour and place (strict), after the last iteration.
"""
SCORES = """
## Scores

Mean over seeds ± standard deviation between them, with a 95 % interval over resampled prompts and seeds (over prompts
only, where one seed is finished). "As trained" draws with the guidance of the rollout. Published: GenEval of the 1.7B
model.
"""
TIMES = """
## What it took

Medians over seeds, of all runs that have begun. Evaluations during training, on fewer prompts than the last one and
drawn as in training, show when the score first reaches {level}: after how many iterations, forward passes of one
image (millions; see scripts/ablation_settings.py) and seconds of iterations. Largest drop: from the best of these
evaluations to the last one, as a sign of collapse.
"""
ORDER = """
## The published order

Differences in the strict score, with 95 % intervals; one whose interval includes 0 is undecided.
"""
DRAWN = """
## Curves

Means over the finished runs of a setting, or over the unfinished ones if there are none; the band is their range.
"""
PICTURES = """
## Pictures

The same held-out prompts from the same noise, before and after, drawn as in training.
"""
SWEEP = """
## Learning rates

The {score} score after {iterations} iterations at a constant rate (seed {seed}), drawn as in training, on
{validation}, none of which is held out.
"""
UNFINISHED = """
## Unfinished and failed runs

"""


def write_page(results: Results, page: Path) -> None:
    """Write FILE.md and, beside it, FILE-CURVE.svg and FILE-SETTING.png."""
    sections = [_head(results), _scores(results), _times(results), _order(results)]
    sections += [_curves(results, page), _pictures(results, page), _sweep(results), _failures(results)]
    text = "".join(section for section in sections if section)
    replace_file(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _head(results: Results) -> str:
    total = results.seeds * len(results.settings)
    other = [f"{one.iterations} for {one.name}" for one in results.settings if one.iterations != results.iterations]
    return HEAD.format(
        iterations=results.iterations,
        fewer=", ".join(other) or "all settings",
        seeds=results.seeds,
        finished=sum(len(one.finished()) for one in results.settings),
        total=total,
    )


def _scores(results: Results) -> str:
    heads = (
        "setting",
        "what it is",
        "published",
        "rate",
        "seeds",
        "strict, as trained",
        "mean of the tags, as trained",
    )
    rows = []
    for number, one in enumerate(results.settings):
        trained, free = one.scores(one.trained), one.scores(one.free)
        published = NONE if one.setting.published is None else f"{one.setting.published:.2f}"
        rate = NONE if one.rate is None else f"{one.rate:g}"
        row = [one.name, one.setting.description, published, rate, str(len(one.finished()))]
        for scores, tags in ((trained, False), (trained, True), (free, False), (free, True)):
            row.append(NONE if scores is None else _interval(mean_interval(scores, tags, number)))
        rows.append(row)
    text = SCORES + table((*heads, "strict, without guidance", "mean of the tags, without guidance"), rows)
    bases = results.bases()
    start = ", ".join(f"{score:.3f} by the sampler {name}" for name, score in bases.items())
    return text + (f"\nThe start model, before any training: {start}.\n" if bases else "")


def _times(results: Results) -> str:
    heads = (
        "setting",
        "runs that reach it",
        "iterations",
        "forward passes",
        "seconds",
        "passes per iteration and image",
    )
    rows = []
    for one in results.settings:
        reached = [point for run in one.runs if (point := run.reached())]
        row = [one.name, f"{len(reached)} of {len(one.runs)}"]
        row.append(_median([point.iterations for point in reached], "{:.0f}"))
        row.append(_median([point.passes / 1e6 for point in reached], "{:.2f}"))
        row.append(_median([point.seconds for point in reached], "{:.0f}"))
        row.append(str(one.passes))
        row.append(_median([run.seconds() for run in one.runs], "{:.2f}"))
        row.append(_most([run.largest("kl") for run in one.runs], "{:.4f}"))
        row.append(_median([run.last("entropy") for run in one.runs], "{:.3f}"))
        row.append(_most([_drop(run) for run in one.runs], "{:.3f}"))
        rows.append(row)
    more = ("seconds per iteration", "largest KL", "entropy at the end", "largest drop")
    return TIMES.format(level=LEVEL) + table((*heads, *more), rows)


def _drop(run: RunResult) -> float | None:
    scores = [score for _, score in run.curve("heldout")]
    return max(scores) - scores[-1] if scores else None


def _order(results: Results) -> str:
    """Return how the order of the published table compares with the measured one, pair by pair."""
    rows = []
    by_name = {one.name: (number, one) for number, one in enumerate(results.settings)}
    for first, second in itertools.combinations([name for name in PUBLISHED if name in by_name], 2):
        (a, before), (b, after) = by_name[first], by_name[second]
        published = f"{before.setting.published:.2f} < {after.setting.published:.2f}"
        row = [f"{first} < {second}", published]
        for kind in ("trained", "free"):
            sides = [one.scores(getattr(one, kind)) for one in (before, after)]
            if sides[0] is None or sides[1] is None:
                row += [NONE, NONE]
                continue
            gap = difference(sides[0], sides[1], (a, b))
            row += [_interval({**gap, "spread": None}, "{:+.3f}"), verdict(gap)]
        rows.append(row)
    heads = ("order", "published", "as trained", "", "without guidance", "")
    return ORDER + table(heads, rows) if rows else ""


def verdict(gap: dict[str, Any]) -> str:
    """Return whether a difference agrees with the published order."""
    if gap["low"] is None or gap["low"] <= 0 <= gap["high"]:
        return "undecided"
    return "agrees" if gap["low"] > 0 else "disagrees"


def _curves(results: Results, page: Path) -> str:
    lines = [DRAWN]
    for name, title in CURVES.items():
        pairs = []
        for number, one in enumerate(results.settings):
            curve = mean_curve(one.name, [run.curve(name) for run in one.finished() or one.runs])
            if curve:
                pairs.append((curve, COLORS[number % len(COLORS)]))
        if pairs:
            file = page.with_name(f"{page.stem}-{name}.svg")
            _write(file, chart(title, [curve for curve, _ in pairs], [color for _, color in pairs]).encode())
            lines.append(f"\n![{title}]({file.name})\n")
    return "".join(lines) if len(lines) > 1 else ""


def _pictures(results: Results, page: Path) -> str:
    lines = [PICTURES]
    for one in results.settings:
        drawn = [run for run in one.finished() if run.folder.before_after]
        if drawn and drawn[0].folder.before_after:
            file = page.with_name(f"{page.stem}-{one.name}.png")
            _write(file, drawn[0].folder.before_after.read_bytes())
            lines.append(f"\n{one.name}, seed {drawn[0].seed}:\n\n![before and after]({file.name})\n")
    return "".join(lines) if len(lines) > 1 else ""


def _sweep(results: Results) -> str:
    rows = []
    for name, part in results.sweep["settings"].items():
        cells = [
            f"{rate}: {'failed' if rate in part['failed'] else NONE if score is None else f'{score:.3f}'}"
            for rate, score in part["scores"].items()
        ]
        rows.append([name, "; ".join(cells), NONE if part["chosen"] is None else f"{part['chosen']:g}"])
    return SWEEP.format(**results.sweep) + table(("setting", "rate: score", "chosen"), rows)


def _failures(results: Results) -> str:
    unfinished = [
        f"- {one.name}, seed {run.seed}: {run.folder.last} of {one.iterations} iterations\n"
        for one in results.settings
        for run in one.runs
        if not run.finished
    ]
    failed = [
        f"- {name}: failed with status {failure['status']}; failures.json has the end of its log\n"
        for name, failure in results.failures.items()
    ]
    lines = [*unfinished, *failed, *(f"- {name}: its folder cannot be read\n" for name in results.unreadable)]
    return "".join([UNFINISHED, *lines]) if lines else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n" + "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _interval(value: dict[str, Any], form: str = "{:.3f}") -> str:
    spread = "" if value["spread"] is None else f" ± {value['spread']:.3f}"
    between = "" if value["low"] is None else f" [{form.format(value['low'])}, {form.format(value['high'])}]"
    return f"{form.format(value['value'])}{spread}{between}"


def _summary(of: Callable[[list[float]], Any], values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(of(known)) if known else NONE


def _median(values: Sequence[float | None], form: str) -> str:
    return _summary(np.median, values, form)


def _most(values: Sequence[float | None], form: str) -> str:
    return _summary(max, values, form)


def _write(file: Path, content: bytes) -> None:
    replace_file(file, lambda temporary: temporary.write_bytes(content))

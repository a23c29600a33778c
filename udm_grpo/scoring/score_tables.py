"""summary.md and comparison.md: the contents of summary.json and comparison.json as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from udm_grpo.scoring.score_summary import RULE


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; cells may hold any text."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def number(value: float | None) -> str:
    """Return a number with three decimals, from 10 on with four significant digits; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def bounds(interval: Mapping[str, Any]) -> str:
    """Return an interval, or a dash if a single prompt allows none."""
    return "-" if interval["low"] is None else f"{number(interval['low'])} to {number(interval['high'])}"


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return summary.md."""
    parts = [
        f"# Scores of {summary['samples']}",
        f"{summary['images']} pictures of {summary['prompts']} prompts. Intervals: {summary['confidence']:.0%}, "
        f"bootstrap over prompts ({summary['resamples']} resamples, seed {summary['seed']}).",
        _means(summary),
    ]
    for name, scorer in summary["scorers"].items():
        values = scorer["values"]
        if "overall" in values["score"]:
            parts += [f"## {name} by tag", _by_tag(values)]
        if "correct_prompts" in scorer:
            share = f"{scorer['correct_prompts']:.1%}"
            parts.append(f"Prompts with at least one picture that is right by the official rule: {share}.")
    if summary["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in summary["warnings"])]
    return "\n\n".join(parts) + "\n"


def _means(summary: Mapping[str, Any]) -> str:
    rows = [
        [name, value, number(entry["mean"]["value"]), bounds(entry["mean"]), str(entry["mean"]["images"])]
        for name, scorer in summary["scorers"].items()
        for value, entry in shown(scorer["values"]).items()
    ]
    return table(["scorer", "value", "mean", "95 % interval", "pictures"], rows)


def shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values to show: a score that is one of the raw values appears once; GenEval's are in its order."""
    same = any(values["score"]["mean"] == entry["mean"] for name, entry in values.items() if name != "score")
    order = sorted(values, key=lambda name: RULE.index(name) if name in RULE else -1)
    return {name: values[name] for name in order if not (same and name == "score")}


def _by_tag(values: Mapping[str, Any]) -> str:
    names = shown(values)
    rows = []
    for tag, first in values["score"]["tags"].items():
        cells = [_cell(names[name]["tags"][tag]) for name in names]
        rows.append([tag, *cells, str(first["prompts"]), str(first["images"])])
    whole = values["score"]["overall"]
    cells = [_cell(entry["overall"]) for entry in names.values()]
    rows.append(["**overall** (mean of the tags)", *cells, str(whole["prompts"]), str(whole["images"])])
    return table(["tag", *names, "prompts", "pictures"], rows)


def _cell(interval: Mapping[str, Any]) -> str:
    return f"{number(interval['value'])} ({bounds(interval)})"


def comparison_text(comparison: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Return comparison.md; pictures: {scorer: the file with its most changed prompts}."""
    rows = []
    for name, scorer in comparison["scorers"].items():
        for value, entry in shown(scorer["values"]).items():
            for key in (key for key in ("mean", "overall") if key in entry):
                label = f"{value}, mean of the tags" if key == "overall" else value
                rows.append([name, label, *_moved(entry[key]), bounds(entry[key]["difference"])])
    parts = [
        f"# {comparison['before']} -> {comparison['after']}",
        f"{comparison['prompts']} prompts in both. Intervals of the difference: {comparison['confidence']:.0%}, "
        "bootstrap over prompts, the same ones before and after.",
        table(["scorer", "value", "before", "after", "difference", "95 % interval"], rows),
    ]
    for name, scorer in comparison["scorers"].items():
        if "overall" in scorer["values"]["score"]:
            parts += [f"## {name} by tag", _changes_by_tag(scorer["values"])]
        counts = ", ".join(f"{count} {word}" for word, count in scorer["prompts"].items())
        rows = [
            [row["prompt"], number(row["before"]), number(row["after"]), f"{row['difference']:+.3f}"]
            for row in scorer["changed"]
        ]
        parts.append(f"## Prompts that changed most by {name}\n\nOf all prompts: {counts}.")
        if rows:
            parts += [table(["prompt", "before", "after", "difference"], rows), f"![{name}]({pictures[name]})"]
    if comparison["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in comparison["warnings"])]
    return "\n\n".join(parts) + "\n"


def _moved(change: Mapping[str, Any]) -> list[str]:
    return [number(change["before"]), number(change["after"]), f"{change['difference']['value']:+.3f}"]


def _changes_by_tag(values: Mapping[str, Any]) -> str:
    names = shown(values)
    tags = [key for key in values["score"] if key.startswith("tag:")]
    cells = {key: [_moved(entry[key]) for entry in names.values()] for key in tags}
    rows = [
        [key.removeprefix("tag:"), *(f"{before} -> {after} ({change})" for before, after, change in cells[key])]
        for key in tags
    ]
    return table(["tag", *names], rows)

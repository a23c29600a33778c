"""Line charts as SVG: curves over iterations with a legend.

Our own, since no plotting library is among the dependencies and a page of Markdown shows SVG files as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLORS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
"""Distinguishable with any colour vision (Okabe and Ito 2008)."""
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 340, 60, 34, 200, 40
MAX_POINTS = 100
"""Points of a curve; longer ones are averaged over neighbours."""


@dataclass(frozen=True)
class Curve:
    """A curve, with the range over several runs as a band around it."""

    label: str
    steps: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def mean_curve(label: str, runs: Sequence[Sequence[tuple[int, float]]]) -> Curve | None:
    """Return the mean and the range of several runs' (step, value), at the steps that all have, if there are any."""
    tables = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not steps:
        return None
    per = max(1, -(-len(steps) // MAX_POINTS))
    parts = [steps[at : at + per] for at in range(0, len(steps), per)]
    means = [[sum(table[step] for step in part) / len(part) for table in tables] for part in parts]
    return Curve(
        label,
        [part[-1] for part in parts],
        [sum(values) / len(values) for values in means],
        [min(values) for values in means],
        [max(values) for values in means],
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` + 1."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(title: str, curves: Sequence[Curve], colors: Sequence[str]) -> str:
    """Return a chart of these curves as SVG; colors: one for each."""
    values = [value for curve in curves for side in (curve.low, curve.high) for value in side]
    left, right = 0.0, max((step for curve in curves for step in curve.steps), default=1.0) or 1.0
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (step - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>']
    for tick in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in ticks(left, right):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">iterations</text>')
    for row, (curve, color) in enumerate(zip(curves, colors, strict=True)):
        edge = [*zip(curve.steps, curve.high, strict=True), *reversed([*zip(curve.steps, curve.low, strict=True)])]
        band, line = (
            " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            for points in (edge, zip(curve.steps, curve.middle, strict=True))
        )
        at = TOP + 10 + 18 * row
        parts.append(f'<polygon points="{band}" fill="{color}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {at}h20" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 38}" y="{at + 4}">{escape(curve.label)}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>\n"])

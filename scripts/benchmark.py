"""Time the stages of an iteration on the available devices, with random weights of a given model size.

    python -m scripts.benchmark --size shapes
    python -m scripts.benchmark --size shapes --against torch
    python -m scripts.benchmark --size 1.7b --rollout-batch 16 --minutes 9 --output outputs/benchmark.json

sampler    one step for 64 tokens               decode     codes to images
forward    one denoising step without the head  reference  training states and their log-probabilities
rollout    a whole rollout                      update     one optimizer step
scoring    a round trip to a scorer             iteration  all of these, queued as the training loop queues them

Each stage is called until its share of the time is used up, at least three times after the first call, which compiles.
A stage for which no time is left is skipped and listed. --against torch runs the same formulas in plain PyTorch on the
CPU, alternating with ours in one process. Figures are medians with the middle half of the calls; FLOPs are those of the
matrix products, and the ceiling is a large matrix product in the run's own dtype, measured in the same run.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from scripts.benchmark_stages import SIZES, Setting, Stage, described, draw_arrays, open_setting, stages
from udm_grpo.devices import on_devices, prepare
from udm_grpo.files.atomic import replace_file
from udm_grpo.files.places import local_args

NAMES = ("sampler", "forward", "rollout", "decode", "scoring", "reference", "update", "iteration")
MIN_CALLS, MAX_CALLS = 3, 50
"""Calls of a stage after the first."""
CEILING_SIDE = {"cpu": 2048}
"""Platform -> side of the matrices that measure the ceiling; 8192 on other platforms."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a stage's calls."""

    first: float
    """The first call, which compiles."""
    calls: list[float]
    """All later calls."""

    @property
    def median(self) -> float:
        """Return the median of the later calls."""
        return statistics.median(self.calls)

    @property
    def spread(self) -> tuple[float, float]:
        """Return the first and the third quartile."""
        if len(self.calls) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.calls, n=4, method="inclusive")
        return low, high


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the seconds of one call, until its result is ready."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def measure(runs: Sequence[Callable[[], Any]], budget_s: float) -> list[Timing]:
    """Call these functions in turn until the time is used up; return the timing of each."""
    firsts = [seconds_of(run) for run in runs]
    calls: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + budget_s
    for turn in range(MAX_CALLS):
        if turn >= MIN_CALLS and time.perf_counter() > end:
            break
        for run, seconds in zip(runs, calls, strict=True):
            seconds.append(seconds_of(run))
    return [Timing(*pair) for pair in zip(firsts, calls, strict=True)]


def ceiling(setting: Setting) -> float:
    """Return the TFLOP/s of a large matrix product on one device, in the dtype of the run."""
    device = setting.mesh.devices.flat[0]
    side = CEILING_SIDE.get(device.platform, 8192)
    key = jax.random.key(0)
    matrix = jax.device_put(jax.random.normal(key, (side, side), jnp.dtype(setting.config.model.dtype)), device)
    (timing,) = measure([lambda: matrix @ matrix], 2.0)
    return 2 * side**3 / min(timing.calls) / 1e12


def figures(stage: Stage, timing: Timing, setting: Setting, peak: float) -> dict[str, Any]:
    """Return the report's entry for a stage."""
    low, high = timing.spread
    entry: dict[str, Any] = {
        "stage": stage.name,
        "seconds": timing.median,
        "quartiles": [low, high],
        "calls": len(timing.calls),
        "first_call": timing.first,
        "images": stage.images,
        "ms_an_image_step": 1e3 * timing.median / (stage.images * stage.steps),
        "images_a_second": stage.images / timing.median,
    }
    if stage.flops:
        speed = stage.flops / timing.median / setting.mesh.devices.size / 1e12
        entry |= {"tflops_a_device": speed, "share_of_ceiling": speed / peak}
    return entry


def peak_memory() -> int | None:
    """Return the peak bytes in use on the first device, or None if it does not report them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
    head = ["stage", "ms", "middle half", "ms an image and step", "images/s", "TFLOP/s", "of the ceiling"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for one in report["stages"]:
        low, high = (f"{1e3 * value:.1f}" for value in one["quartiles"])
        speed, share = one.get("tflops_a_device"), one.get("share_of_ceiling")
        row = [one["stage"], f"{1e3 * one['seconds']:.1f}", f"{low} - {high}", f"{one['ms_an_image_step']:.3f}"]
        row += [f"{one['images_a_second']:.1f}", f"{speed:.3g}" if speed else "", f"{share:.0%}" if share else ""]
        rows.append(row)
    if any("torch" in one for one in report["stages"]):
        rows[0].append("PyTorch, ms")
        rows[0].append("PyTorch / ours")
        rows[1] += ["---:", "---:"]
        for row, one in zip(rows[2:], report["stages"], strict=True):
            other = one.get("torch")
            row += [f"{1e3 * other['seconds']:.1f}", f"{other['seconds'] / one['seconds']:.2f}"] if other else ["", ""]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages and return the report, which is written to --output after every stage."""
    setting = open_setting(args.size, args.rollout_batch, args.update_batch)
    end = time.monotonic() + 60 * args.minutes
    arrays = draw_arrays(setting)
    ours = {stage.name: stage for stage in stages(setting, arrays)}
    names = [name for name in NAMES if name in args.stages.split(",")]
    others: dict[str, Callable[[], Any]] = {}
    if args.against == "torch":
        from scripts.benchmark_versus import torch_stages  # which needs torch

        others = torch_stages(setting, arrays)
    peak = ceiling(setting)
    report: dict[str, Any] = {"size": args.size, **described(setting), "ceiling_tflops": peak}
    report |= {"stages": [], "left_out": []}
    for index, name in enumerate(names):
        left = end - time.monotonic()
        if left <= 0:
            report["left_out"].append(name)
            continue
        share = left / (len(names) - index)
        report["stages"].append(_one(name, ours, others, setting, peak, share))
        print(f"{name}: {1e3 * report['stages'][-1]['seconds']:.1f} ms", file=sys.stderr, flush=True)
        report["peak_bytes"] = peak_memory()
        _write(args.output, report)
    _write(args.output, report)
    return report


def _one(
    name: str,
    ours: dict[str, Stage],
    others: dict[str, Callable[[], Any]],
    setting: Setting,
    peak: float,
    budget_s: float,
) -> dict[str, Any]:
    if name == "scoring":
        from scripts.benchmark_scoring import scoring_stage  # which starts a process

        with scoring_stage(setting) as stage:
            (timing,) = measure([stage.run], min(budget_s, 5.0))
            return figures(stage, timing, setting, peak)
    stage = ours[name]
    runs = [stage.run, *([others[name]] if name in others else [])]
    timings = measure(runs, min(budget_s, 30.0))
    entry = figures(stage, timings[0], setting, peak)
    if len(timings) > 1:
        low, high = timings[1].spread
        entry["torch"] = {"seconds": timings[1].median, "quartiles": [low, high], "calls": len(timings[1].calls)}
    return entry


def _write(output: str, report: dict[str, Any]) -> None:
    if output:
        text = json.dumps(report, indent=1) + "\n"
        replace_file(Path(output), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="shapes", help="size of the model (default: %(default)s)")
    parser.add_argument("--stages", default=",".join(NAMES), help="comma-separated stages to time (default: all)")
    parser.add_argument("--against", choices=("torch",), help="compare with plain PyTorch on the CPU")
    parser.add_argument("--rollout-batch", type=int, default=0, help="images at a time (default: the recipe's)")
    parser.add_argument("--update-batch", type=int, default=0, help="states at a time (default: the recipe's)")
    parser.add_argument("--minutes", type=float, default=9.0, help="total time of all stages (default: %(default)s)")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON report, written after every stage")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    prepare()
    parser = _parser()
    args = local_args(parser, argv)
    unknown = sorted(set(args.stages.split(",")) - set(NAMES))
    if unknown:
        parser.error(f"--stages: unknown stage {', '.join(unknown)}; choose from {','.join(NAMES)}")
    try:
        with on_devices():
            report = benchmark(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    hardware = f"{report['devices']} x {report['kind']}, {report['dtype']}"
    print(f"{args.size} on {hardware}, ceiling {report['ceiling_tflops']:.3g} TFLOP/s a device\n")
    print(table(report))
    if report["left_out"]:
        print(f"\nskipped for lack of time: {', '.join(report['left_out'])}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Compare the ablations of UDM-GRPO on the shapes world: a run for each setting and seed, a table and curves.

    python -m scripts.ablation --output outputs/ablation                # everything: an estimated 12 hours on two cores
    python -m scripts.ablation --output outputs/ablation-small --small  # one seed of the published table, in an hour
    python -m scripts.ablation --output outputs/ablation --report       # the table and curves so far

Settings are those of the published table, trained with and without guidance, and Reduced-Step windows against all steps
(ablation_settings.py). Each first gets a learning rate from a sweep: a few dozen iterations with each of a few rates, a
seed of its own, judged on prompts that are not the held-out ones. Then come the runs: all settings with seed 0, all
with seed 1, and so on, each in a process of its own. Where guidance is trained with, it is also evaluated with during
training; the last evaluation is with and without it.

The state is in --output, and the same command continues there; its flags are stored with it. --small runs the four
published settings with one seed for fewer iterations, and stops after an hour: too short for the collapse that the
paper reports after about 500 steps. SIGTERM, Ctrl-C and the end of --minutes stop the present run, which saves a
checkpoint; the exit status is then 75. A run that fails is recorded in failures.json with the end of its log and is not
started again without --retry; the others continue, and the exit status is 1.

    settings.json             flags; another value for the same folder is an error, except for --seeds and --settings
    validation.jsonl          prompts that the sweep is judged on
    sweep.json                scores of every learning rate, and the chosen ones
    runs/NAME-seedN, .log     a training run's folder and its log; sweep-NAME-xFACTOR for the sweep
    ablation.md, ablation-*   table, curves and pictures of what is finished so far; --page FILE.md: elsewhere
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser, flag
from rewards_bridge.redaction import guarded
from scripts.ablation_page import write_page
from scripts.ablation_results import read_results
from scripts.ablation_runs import (
    STOPPED,
    AblationError,
    Plan,
    Runner,
    Stop,
    StoppedError,
    failures_file,
    final_scores,
    read_failures,
    read_sweep,
)
from scripts.ablation_settings import PUBLISHED, settings
from udm_grpo.files.bucket_lock import lock_output
from udm_grpo.files.places import PlaceError, check_flags
from udm_grpo.reporting.metrics import write_json

TRAIN = (sys.executable, "-m", "udm_grpo.train")
DEFAULTS: dict[str, Any] = {
    "config": "configs/shapes.py",
    "overrides": {},
    "iterations": 500,
    "sweep_iterations": 40,
    "factors": [0.5, 1.0, 2.0],
    "validation": "",
    "seeds": 3,
    "settings": [],
}
"""Flags that are stored with the folder; no settings: all of them."""
SMALL: dict[str, Any] = {"iterations": 120, "sweep_iterations": 12, "seeds": 1, "settings": list(PUBLISHED)}
SMALL_MINUTES = 60.0
FREE = ("seeds", "settings")
"""Flags that may change from call to call."""


def read_flags(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that hold: those of this call, else those of the folder, else the defaults.

    Raises AblationError if the folder's runs were started with others.
    """
    stored = _stored(folder)
    named = {name: vars(args)[name] for name in DEFAULTS if vars(args)[name] is not None}
    differing = [name for name, value in named.items() if name in stored and name not in FREE and stored[name] != value]
    if differing:
        lines = [f"{flag(name)} is {named[name]}, but {folder} was begun with {stored[name]}" for name in differing]
        raise AblationError("\n  ".join([*lines, "Leave it out to continue there, or choose another --output."]))
    return {**DEFAULTS, **(SMALL if args.small and not stored else {}), **stored, **named}


def _stored(folder: Path) -> dict[str, Any]:
    file = folder / "settings.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def plan_of(folder: Path, flags: dict[str, Any]) -> Plan:
    """Return the plan of these flags; raise AblationError for names and numbers that are not valid."""
    least = {"iterations": 1, "sweep_iterations": 1, "seeds": 1}
    problems = [
        f"{flag(name)} is {flags[name]}; choose at least {low}." for name, low in least.items() if flags[name] < low
    ]
    if not flags["factors"] or min(flags["factors"]) <= 0:
        problems.append(f"--factors is {flags['factors']}; give factors above 0.")
    if "iterations" in flags["overrides"]:
        problems.append("--config.iterations: write --iterations, which the sweep and the settings depend on.")
    if problems:
        raise AblationError("\n  ".join(problems))
    base = {"iterations": str(flags["iterations"]), **flags["overrides"]}
    known = settings(flags["config"], base)
    if unknown := [name for name in flags["settings"] if name not in known]:
        raise AblationError(f"--settings {' '.join(unknown)}: choose from {' '.join(known)}.")
    return Plan(
        folder=folder,
        config=flags["config"],
        overrides=flags["overrides"],
        iterations=flags["iterations"],
        sweep_iterations=flags["sweep_iterations"],
        factors=tuple(flags["factors"]),
        seeds=flags["seeds"],
        names=tuple(flags["settings"] or known),
        validation=Path(flags["validation"]) if flags["validation"] else None,
    )


def run_all(plan: Plan, runner: Runner, page: Path) -> None:
    """Bring the sweep and all runs to their ends, and write the page after each; raises StoppedError."""
    plan.write_validation()
    for name in plan.swept():
        for factor in plan.factors:
            runner.finish(plan.sweep_run(name, factor))
        write_json(plan.folder / "sweep.json", read_sweep(plan))
    sweep = read_sweep(plan)["settings"]
    for seed in range(plan.seeds):
        for name in plan.settings:
            rate = sweep[plan.sweep_of(name)]["chosen"]
            if rate is None:
                print(f"{name}: no rate of its sweep is finished, so it is left out", flush=True)
                continue
            run = plan.run(name, seed, rate)
            known = final_scores(plan.folder, run)
            if runner.finish(run) and not known:
                write_page(read_results(plan), page)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m scripts.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--seeds", type=int, help="runs of every setting (default: 3)")
    parser.add_argument("--iterations", type=int, help="iterations of a run (default: 500)")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="settings to run (default: all)")
    parser.add_argument("--sweep-iterations", type=int, help="iterations of a run of the sweep (default: 40)")
    parser.add_argument(
        "--factors",
        nargs="+",
        type=float,
        metavar="F",
        help="learning rates of the sweep, as factors (default: 0.5 1 2)",
    )
    parser.add_argument(
        "--validation",
        metavar="FILE",
        help="prompts that the sweep is judged on (default: validation.jsonl beside the training prompts)",
    )
    parser.add_argument("--config", metavar="FILE", help="base configuration; --config.field=value for every run, too")
    parser.add_argument(
        "--small",
        action="store_true",
        help=f"at most an hour: the published settings, one seed, {SMALL['iterations']} iterations, a short sweep",
    )
    parser.add_argument("--minutes", type=float, help="stop after so long (default: 60 with --small, else never)")
    parser.add_argument("--retry", action="store_true", help="start failed runs again")
    parser.add_argument("--report", action="store_true", help="only write the table and curves of what is finished")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page to write (default: ablation.md in --output)")
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    pairs = [word.removeprefix("--config.").partition("=") for word in rest]
    if any(not word.startswith("--config.") or not equals for word, (_, equals, _) in zip(rest, pairs, strict=True)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}; write settings as --config.field=value")
    args.overrides = {name: value for name, _, value in pairs} or None
    try:
        check_flags(args)
    except PlaceError as error:
        parser.error(str(error))
    args.validation = args.validation and str(Path(args.validation).absolute())
    return args


def _run(folder: Path, args: argparse.Namespace, train: Sequence[str]) -> int:
    flags = read_flags(folder, args)
    plan = plan_of(folder, flags)
    page = (args.page or folder / "ablation.md").absolute()
    if args.report:
        write_page(read_results(plan), page)
        print(page)
        return 0
    minutes = args.minutes if args.minutes is not None else (SMALL_MINUTES if args.small else float("inf"))
    stop = Stop(time.monotonic() + 60 * minutes)
    with lock_output(folder), contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        write_json(folder / "settings.json", flags)
        if args.retry:
            failures_file(folder).unlink(missing_ok=True)
        runner = Runner(folder, train, plan.config, stop, read_failures(folder))
        try:
            run_all(plan, runner, page)
        except StoppedError:
            print("stopped; the same command continues", flush=True)
            return STOPPED
        finally:
            write_json(folder / "sweep.json", read_sweep(plan))
            write_page(read_results(plan), page)
    print(f"{page}; failed runs: {', '.join(runner.failures) or 'none'}")
    return 1 if runner.failures else 0


def main(argv: Sequence[str] | None = None, train: Sequence[str] = TRAIN) -> int:
    """Run the command line; return the exit status. train: the command of the trainer."""
    args = _parsed(argv)
    try:
        return _run(args.output.absolute(), args, train)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Kill a small training run at random moments, resume it, and compare its export with that of an uninterrupted run.

    python -m scripts.torture --output outputs/torture --trials 50 --seed 0

A trial starts `configs/shapes.py:smoke`, cut down further, and sends SIGKILL, SIGTERM or SIGINT to the trainer, to the
scorer's process or to both while the run loads, samples a rollout, updates, saves, runs its last evaluation or exports.
The same command then runs again with `checkpoint.resume=latest` until the run is finished. A trial passes if every file
of `export/` is byte-identical to that of the uninterrupted run, as are metrics and evaluations (apart from times); if a
run that was asked to stop exits with its stopped status and without a traceback; if the loss of a scorer alone does not
end a run; and if no process is left over. The exit status is 1 if any trial fails.

The seed determines phases, signals, targets and moments; the progress of the run at that moment depends on the machine.
Results are appended to results.jsonl in --output, one line a trial, and the same command continues after the last one.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import Parser
from rewards_bridge.redaction import guarded
from scripts.torture_run import ITERATIONS, STOPPED, Pace, Progress, Training, TrainingError, measure
from udm_grpo.files.places import local_args

PHASES = ("load", "rollout", "update", "save", "evaluation", "export")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
TARGETS = ("trainer", "scorer", "both")
MAX_STARTS = 5
"""Starts after which an unfinished trial fails."""
LOGS = ("metrics.jsonl", "evaluations.jsonl")
TIMES = ("seconds", "run")
"""Values of a log line that differ between runs: times and the run's id."""


@dataclass(frozen=True)
class Strike:
    """When a run is hit, and by which signal."""

    phase: str
    signal: str
    target: str
    iteration: int
    """Iteration, from 0, of a phase that every iteration has."""
    fraction: float
    """Fraction of the phase that has passed, relative to its duration in the uninterrupted run."""

    def __str__(self) -> str:
        place = f" {self.iteration + 1}" if self.phase in ("rollout", "update", "save") else ""
        return f"{self.signal} to {self.target} at {self.fraction:.0%} of {self.phase}{place}"


def strikes(seed: int) -> Iterator[Strike]:
    """Yield strikes endlessly: every combination of phase, signal and target once, in random order, then all again."""
    rng = random.Random(seed)
    while True:
        combinations = [(phase, name, target) for phase in PHASES for name in SIGNALS for target in TARGETS]
        rng.shuffle(combinations)
        for combination in combinations:
            yield Strike(*combination, iteration=rng.randrange(ITERATIONS), fraction=rng.random())


def run_trial(number: int, strike: Strike, pace: Pace, reference: Path, folder: Path) -> dict[str, Any]:
    """Hit one run and finish it; return its line for results.jsonl, whose "problems" are empty if it passed."""
    output = folder / f"trial-{number:03d}"
    training = Training(output, fresh=True)
    problems: list[str] = []
    statuses: list[int] = []
    hit = None
    try:
        hit = _hit(training, strike, pace)
        statuses.append(training.wait())
        problems += _first_end(strike, hit, statuses[0])
        while statuses[-1] != 0 and len(statuses) < MAX_STARTS:
            training = Training(output)
            statuses.append(training.wait())
        if statuses[-1] != 0:
            problems.append(f"not finished after {len(statuses)} starts: statuses {statuses}")
        else:
            problems += differences(reference, output)
        problems += _logs(training.log)
    except TrainingError as error:
        problems.append(str(error))
    finally:
        training.kill()
    return {"trial": number, **asdict(strike), "hit": str(hit or ""), "statuses": statuses, "problems": problems}


def _hit(training: Training, strike: Strike, pace: Pace) -> Progress | None:
    """Send the signals at their moment; return the run's progress, or None if the run ended before."""
    if not training.wait_for(strike.phase, strike.iteration, strike.fraction, pace):
        return None
    number = signal.Signals[strike.signal]
    if strike.target != "trainer" and not training.signal_scorer(number):
        return None
    if strike.target != "scorer":
        training.signal_trainer(number)
    return training.progress()


def _first_end(strike: Strike, hit: Progress | None, status: int) -> list[str]:
    """Return the problems with the exit status of the run that was hit."""
    if not hit or strike.target == "scorer":
        cause = "the loss of a scorer ended the run" if hit else "the run ended before it was hit,"
        return [] if status == 0 else [f"{cause} with status {status}"]
    if status == 0 and hit.iterations == ITERATIONS:
        return []  # the run was about to finish and did
    expected = -signal.SIGKILL if strike.signal == "SIGKILL" else STOPPED
    return [] if status == expected else [f"the run ended with status {status}; expected {expected}"]


def _logs(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [f"{log} contains a traceback"] if "Traceback (most recent call last)" in text else []


def differences(reference: Path, output: Path) -> list[str]:
    """Return the differences between the files of a finished run and those of the uninterrupted one."""
    expected, exported = digests(reference / "export"), digests(output / "export")
    lines = [f"export/{name} is missing" for name in sorted(expected.keys() - exported.keys())]
    lines += [f"export/{name} is unexpected" for name in sorted(exported.keys() - expected.keys())]
    both = sorted(expected.keys() & exported.keys())
    lines += [f"export/{name} differs" for name in both if expected[name] != exported[name]]
    return lines + [f"{name} differs" for name in LOGS if _lines(reference / name) != _lines(output / name)]


def digests(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def _results(file: Path, seed: int) -> list[dict[str, Any]]:
    """Return each trial's last result of earlier calls with this seed, without a line that a kill has truncated."""
    results = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if result["seed"] == seed:
            results[result["trial"]] = result
    return list(results.values())


def _line(result: dict[str, Any], trials: int) -> str:
    strike = Strike(**{name: result[name] for name in Strike.__dataclass_fields__})
    end = "; ".join(result["problems"]) or "same export"
    where = result["hit"] or "ended before"
    statuses = ", ".join(map(str, result["statuses"]))
    return f"trial {result['trial']}/{trials}: {strike} ({where}), statuses {statuses}: {end}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/torture"), help="folder of all runs")
    parser.add_argument("--trials", type=int, default=50, help="total trials, including those of earlier calls")
    parser.add_argument("--seed", type=int, default=0, help="seed of phases, signals, targets and moments")
    args = local_args(parser, argv)
    if args.trials < 1:
        parser.error(f"--trials is {args.trials}; choose at least 1")
    folder = args.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # A background job of a shell ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    try:
        reference, pace = measure(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    if problems := differences(reference, folder / "again"):
        print(f"error: two uninterrupted runs differ, so nothing can be compared: {'; '.join(problems)}")
        return 1
    file = folder / "results.jsonl"
    results = [result for result in _results(file, args.seed) if result["trial"] <= args.trials]
    for result in results:
        print(_line(result, args.trials), flush=True)
    finished = {result["trial"] for result in results}
    for number, strike in zip(range(1, args.trials + 1), strikes(args.seed), strict=False):
        if number in finished:
            continue
        result = {"seed": args.seed, **run_trial(number, strike, pace, reference, folder)}
        results.append(result)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        print(_line(result, args.trials), flush=True)
    failed = [result["trial"] for result in results if result["problems"]]
    print(f"{len(results)} trials, failed: {', '.join(map(str, failed)) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))

"""The runs of scripts/ablation.py: which there are, by which command lines, and in which state they are.

The state is in the folder: a run is finished if its summary.json has all iterations, and failed if failures.json lists
it. A run that was stopped or killed is resumed from its last checkpoint by the same command line.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from rewards_bridge.errors import UserError
from scripts.ablation_settings import Setting, configured, settings, words
from udm_grpo.config import RunConfig
from udm_grpo.data.prompts import read_prompts
from udm_grpo.files.folder_lock import WAIT_VARIABLE
from udm_grpo.reporting.metrics import write_json
from udm_grpo.scoring.score_summary import write_lines

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75
"""Exit status of a run, and of the command, that was asked to stop."""
SWEEP_SEED = 1000
VALIDATION_PROMPTS = 96
"""Training prompts that the sweep is judged on if there is no file of validation prompts."""
SCORE = "strict"
POLL_S = 0.2
LAST_LINES = 20
"""Lines of a failed run's log that failures.json keeps."""


class AblationError(UserError, RuntimeError):
    """A folder or an argument that the command cannot use."""


class StoppedError(Exception):
    """The command was asked to stop, or its time is up."""


@dataclass(frozen=True)
class Run:
    """A training run in FOLDER/runs."""

    name: str
    overrides: tuple[Mapping[str, str], ...]
    iterations: int

    @property
    def words(self) -> list[str]:
        """Return the overrides as a command line."""
        return words(*self.overrides)


@dataclass(frozen=True)
class Plan:
    """All runs of an ablation."""

    folder: Path
    config: str
    """FILE[:variant] of the base configuration."""
    overrides: Mapping[str, str]
    """Overrides of it, for every run."""
    iterations: int
    sweep_iterations: int
    factors: tuple[float, ...]
    """Learning rates of the sweep, as factors of the base configuration's."""
    seeds: int
    names: tuple[str, ...]
    """Settings to run."""
    validation: Path | None = None
    """Prompts that the sweep is judged on; None: those beside the training prompts, else a sample of these."""

    @cached_property
    def base(self) -> dict[str, str]:
        """Return the overrides that all runs share."""
        return {"evaluation.every": "25", "iterations": str(self.iterations), **self.overrides}

    @cached_property
    def known(self) -> dict[str, Setting]:
        """Return all settings by their names."""
        return settings(self.config, self.base)

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Return the settings to run by their names, in the order of `known`."""
        return {name: one for name, one in self.known.items() if name in self.names}

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """Return the configuration of every known setting, apart from seed, learning rate and output_dir."""
        return {name: configured(self.config, self.base, one.overrides) for name, one in self.known.items()}

    @cached_property
    def rates(self) -> dict[float, float]:
        """Return the learning rates of the sweep by their factors."""
        rate = configured(self.config, self.base).optimizer.learning_rate
        return {factor: float(f"{factor * rate:.6g}") for factor in self.factors}

    def swept(self) -> list[str]:
        """Return the settings with a sweep of their own."""
        return list(dict.fromkeys(self.sweep_of(name) for name in self.settings))

    def sweep_of(self, name: str) -> str:
        """Return the setting whose sweep determines a setting's learning rate."""
        return self.known[name].like or name

    def sweep_run(self, name: str, factor: float) -> Run:
        """Return a run of the sweep: constant rate, judged once, at its end and on validation prompts."""
        config = self.configs[name]
        evaluation = {
            "evaluation.every": "0",
            "evaluation.picture_every": "0",
            "evaluation.extremes": "0",
            "evaluation.final_prompts": "10000",
            "evaluation.steps": f"({config.evaluation.steps[0]},)",
            "evaluation.guidance_scales": f"({config.evaluation.guidance_scales[0]},)",
            "prompts.heldout": str(self.validation_file()),
        }
        optimizer = {
            "optimizer.schedule": "constant",
            "optimizer.learning_rate": f"{self.rates[factor]:g}",
            "optimizer.warmup_updates": str(min(config.optimizer.warmup_updates, self.sweep_iterations // 4)),
        }
        own = {"iterations": str(self.sweep_iterations), "checkpoint.every": "0", "seed": str(SWEEP_SEED)}
        run = f"sweep-{name}-x{factor:g}"
        overrides = (self.base, self.known[name].overrides, evaluation, optimizer, own, self._ends(run))
        return Run(run, overrides, self.sweep_iterations)

    def run(self, name: str, seed: int, rate: float) -> Run:
        """Return the run of a setting and a seed."""
        own = {"seed": str(seed), "optimizer.learning_rate": f"{rate:g}"}
        run = run_name(name, seed)
        overrides = (self.base, self.settings[name].overrides, own, self._ends(run))
        return Run(run, overrides, self.configs[name].iterations)

    def validation_file(self) -> Path:
        """Return the file of the prompts that the sweep is judged on."""
        return self.validation or self.folder / "validation.jsonl"

    def write_validation(self) -> None:
        """Write that file unless it is there or named: a copy of the one beside the training prompts, or some of these.

        Raises AblationError if any of its prompts is held out.
        """
        prompts, file = configured(self.config, self.base).prompts, self.validation_file()
        beside = Path(prompts.train).with_name("validation.jsonl")
        if not self.validation and not file.exists():
            known = read_prompts(beside if beside.is_file() else prompts.train)
            count = len(known) if beside.is_file() else min(VALIDATION_PROMPTS, len(known))
            write_lines(file, known.fixed(count, SWEEP_SEED)[1])
        if both := {*read_prompts(file).prompts} & {*read_prompts(prompts.heldout).prompts}:
            raise AblationError(
                f"{len(both)} prompts of {file} are held out, such as {min(both)!r}; the final scores would not be "
                "independent of the learning rate. Choose other prompts with --validation."
            )

    def validation_words(self) -> str:
        """Return what the sweep is judged on, in words."""
        if not self.validation_file().is_file():
            return "validation prompts"
        prompts = read_prompts(self.validation_file()).prompts
        trained = {*prompts} <= {*read_prompts(configured(self.config, self.base).prompts.train).prompts}
        return f"{len(prompts)} {'training' if trained else 'validation'} prompts"

    def _ends(self, run: str) -> dict[str, str]:
        """Return where a run is written and how it ends and continues."""
        output = self.folder / "runs" / run
        return {
            "output_dir": str(output),
            "checkpoint.resume": "latest",
            "checkpoint.stopped_status": str(STOPPED),
        }


def run_name(name: str, seed: int) -> str:
    """Return the name of the run of a setting and a seed."""
    return f"{name}-seed{seed}"


def final_scores(folder: Path, run: Run) -> dict[str, Any] | None:
    """Return the final evaluation of a finished run; None if it is not finished."""
    try:
        summary = json.loads((folder / "runs" / run.name / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(summary["final"]) if summary.get("iterations") == run.iterations else None


@dataclass
class Stop:
    """Whether the command was asked to stop: by SIGTERM or SIGINT, or because its time is up."""

    until: float = float("inf")
    """Time of time.monotonic() when its time is up."""
    asked: bool = False

    def now(self) -> bool:
        """Return whether to stop."""
        return self.asked or time.monotonic() >= self.until

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the request to stop until the end of the block."""

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Runner:
    """Starts runs, one at a time, and records those that fail."""

    folder: Path
    train: Sequence[str]
    """The command of the trainer, without its flags."""
    config: str
    stop: Stop
    failures: dict[str, Any] = field(default_factory=dict)
    """Run -> its exit status and the last lines of its log."""

    def finish(self, run: Run) -> bool:
        """Bring a run to its end unless it has failed before; return whether it is finished. Raises StoppedError."""
        if final_scores(self.folder, run):
            return True
        if run.name in self.failures:
            return False
        if self.stop.now():
            raise StoppedError
        began = time.monotonic()
        print(f"{run.name}: {run.iterations} iterations", flush=True)
        status, asked = self._execute(run)
        if status == STOPPED or (asked and status == -signal.SIGTERM):
            raise StoppedError
        scores = final_scores(self.folder, run) if status == 0 else None
        if scores is None:
            self._fail(run, status)
        else:
            print(f"{run.name}: {SCORE} {scores[SCORE]:.3f} after {time.monotonic() - began:.0f} s", flush=True)
        return scores is not None

    def _execute(self, run: Run) -> tuple[int, bool]:
        """Return (exit status of the run, whether it was asked to stop)."""
        log = self.folder / "runs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # A run whose command was killed continues by itself; the same run then waits for the end of that one.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {WAIT_VARIABLE: "1e9", **os.environ, "PYTHONPATH": path}
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*self.train, f"--config={self.config}", *run.words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches this process only, which passes it on once
            )
        asked = False
        while process.poll() is None:
            if not asked and self.stop.now():
                process.terminate()
                asked = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        return process.returncode, asked

    def _fail(self, run: Run, status: int) -> None:
        log = self.folder / "runs" / f"{run.name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        self.failures[run.name] = {"status": status, "lines": lines}
        write_json(failures_file(self.folder), self.failures)
        print(f"{run.name}: failed with status {status}; see {log}", flush=True)


def failures_file(folder: Path) -> Path:
    """Return the file that lists the failed runs."""
    return folder / "failures.json"


def read_failures(folder: Path) -> dict[str, Any]:
    """Return the failed runs by name."""
    file = failures_file(folder)
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def read_sweep(plan: Plan) -> dict[str, Any]:
    """Return the sweep so far: its settings, the scores of every rate and the rates that it has chosen.

    A rate is chosen once all of its runs have ended; of equal scores, the lower rate is chosen.
    """
    failures, results = read_failures(plan.folder), {}
    for name in plan.swept():
        runs = {rate: plan.sweep_run(name, factor) for factor, rate in plan.rates.items()}
        finals = {rate: final_scores(plan.folder, run) for rate, run in runs.items()}
        ended = all(finals[rate] or run.name in failures for rate, run in runs.items())
        scores = {rate: final[SCORE] for rate, final in finals.items() if final}
        best = max(sorted(scores), key=lambda rate: scores[rate], default=None) if ended else None
        results[name] = {
            "scores": {f"{rate:g}": scores.get(rate) for rate in runs},
            "chosen": best,
            "failed": [f"{rate:g}" for rate, run in runs.items() if run.name in failures],
        }
    return {
        "iterations": plan.sweep_iterations,
        "seed": SWEEP_SEED,
        "score": SCORE,
        "validation": plan.validation_words(),
        "settings": results,
    }

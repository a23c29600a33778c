"""The training runs of scripts/torture.py: start them, follow them by the files that they write, and send signals.

The trainer runs unchanged: a phase is recognised by the files in output_dir, and a moment within it by the duration of
that phase in an uninterrupted run.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards_bridge.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 3
STOPPED = 75
SETTINGS = (
    *(f"iterations={ITERATIONS}", f"checkpoint.stopped_status={STOPPED}", "checkpoint.resume=latest"),
    *("checkpoint.every=1", "rollout.prompts=2", "evaluation.every=2", "evaluation.picture_every=2"),
    *("evaluation.prompts=4", "evaluation.final_prompts=8", "evaluation.images_per_prompt=1", "evaluation.batch=4"),
    *("evaluation.picture_prompts=4", "evaluation.extremes=1"),
)
"""Overrides of configs/shapes.py:smoke that keep every phase short."""
POLL_S = 0.003
LIMIT_S = 900.0
"""Seconds that one start may take, on a busy machine, too."""
LEFT_OVER_S = 15.0
"""Seconds that a scorer may outlive its trainer."""


class TrainingError(UserError, RuntimeError):
    """A run that hangs or fails where it should not; the message names its log."""


@dataclass(frozen=True)
class Pace:
    """Durations of an uninterrupted run's phases in seconds."""

    load: float
    """From the start to the end of the base evaluation."""
    save: float
    evaluation: float
    """From the last iteration to the export."""
    export: float
    stages: tuple[Mapping[str, float], ...]
    """Durations of each iteration's stages, by their names in metrics.jsonl."""

    def delay(self, phase: str, iteration: int, fraction: float) -> float:
        """Return the seconds from the sign of a phase's start to a moment in it."""
        if phase in ("rollout", "update"):
            stages = self.stages[iteration]
            before = 0.0 if phase == "rollout" else stages["rollout"] + stages["reference"] + stages["reward"]
            return before + fraction * stages[phase]
        return fraction * float(getattr(self, phase))


@dataclass(frozen=True)
class Progress:
    """The progress of a run when it was hit."""

    seconds: float
    """Seconds since its start."""
    iterations: int
    """Iterations in metrics.jsonl."""

    def __str__(self) -> str:
        return f"after {self.seconds:.1f} s, {self.iterations} iterations written"


class Training:
    """One start of a run with the output folder `output`; the log is written beside it."""

    def __init__(self, output: Path, fresh: bool = False) -> None:
        self.output, self.log = output, output.with_name(f"{output.name}.log")
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
            self.log.unlink(missing_ok=True)
        words = [f"--config.{setting}" for setting in (f"output_dir={output}", *SETTINGS)]
        self._scorers: set[int] = set()
        self._started = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "udm_grpo.train", "--config", "configs/shapes.py:smoke", *words],
                cwd=ROOT,
                env={"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until(self, seen: str, iteration: int = 0) -> float | None:
        """Wait for a sign of `signs`; return the seconds since the start, or None if the run ends before."""
        while not self.signs(iteration)[seen]:
            if self._process.poll() is not None:
                return None
            self._check_time()
            time.sleep(POLL_S)
        return time.monotonic() - self._started

    def signs(self, iteration: int) -> dict[str, bool]:
        """Return phase -> whether it has begun, judged by the files."""
        done, checkpoints = self._count("metrics.jsonl"), self.output / "checkpoints"
        loaded = self._count("evaluations.jsonl") > 0
        return {
            "load": True,
            "rollout": loaded and done >= iteration,
            "update": loaded and done >= iteration,
            "save": any(checkpoints.glob(f"{iteration + 1:08d}*")),
            "evaluation": done >= ITERATIONS and any(checkpoints.glob(f"{ITERATIONS:08d}*")),
            "export": any(self.output.glob(".export*")) or (self.output / "export").exists(),
        }

    def wait_for(self, phase: str, iteration: int, fraction: float, pace: Pace) -> bool:
        """Wait for a moment of a phase; return False if the run ends before."""
        if self.until(phase, iteration) is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(pace.delay(phase, iteration, fraction))
            return False
        return True

    def signal_trainer(self, number: signal.Signals) -> None:
        """Send the trainer a signal."""
        self._scorers |= set(_scorers_of(self._process.pid))
        self._process.send_signal(number)

    def signal_scorer(self, number: signal.Signals) -> bool:
        """Send the scorer's process a signal once it exists; return False if the run ends before."""
        while not (scorers := list(_scorers_of(self._process.pid))):
            if self._process.poll() is not None:
                return False
            self._check_time()
            time.sleep(POLL_S)
        self._scorers |= set(scorers)
        for scorer in scorers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(scorer, number)
        return True

    def progress(self) -> Progress:
        """Return the present progress."""
        return Progress(time.monotonic() - self._started, self._count("metrics.jsonl"))

    def wait(self) -> int:
        """Wait for the end; return the exit status. Raises TrainingError on a timeout or if a scorer stays behind."""
        while self._process.poll() is None:
            self._scorers |= set(_scorers_of(self._process.pid))
            self._check_time()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)
        deadline = time.monotonic() + LEFT_OVER_S
        while left := [scorer for scorer in self._scorers if _is_scorer(scorer)]:
            if time.monotonic() > deadline:
                raise TrainingError(f"scorer {left} has outlived its trainer by {LEFT_OVER_S:g} s; see {self.log}")
            time.sleep(0.1)
        return self._process.returncode

    def kill(self) -> None:
        """Kill the remaining processes of this start."""
        for scorer in self._scorers:
            if _is_scorer(scorer):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(scorer, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _count(self, name: str) -> int:
        try:
            return (self.output / name).read_bytes().count(b"\n")
        except OSError:
            return 0

    def _check_time(self) -> None:
        if time.monotonic() - self._started > LIMIT_S:
            raise TrainingError(f"the run has taken more than {LIMIT_S:g} s; see {self.log}")


def measure(folder: Path) -> tuple[Path, Pace]:
    """Return an uninterrupted run in `folder` and the pace of a second one; both are run once and reused.

    The first run fills the compilation cache for all later ones, so only the second is timed.
    """
    file = folder / "pace.json"
    if not file.exists():
        for name in ("reference", "again"):
            pace = _timed(folder / name)
        file.write_text(json.dumps(pace), encoding="utf-8")
    pace = json.loads(file.read_text(encoding="utf-8"))
    return folder / "reference", Pace(**{**pace, "stages": tuple(pace["stages"])})


def _timed(output: Path) -> dict[str, Any]:
    training = Training(output, fresh=True)
    try:
        loaded, saving = training.until("rollout"), training.until("save", ITERATIONS - 1)
        evaluating, exporting = training.until("evaluation"), training.until("export")
        started = time.monotonic()
        status = training.wait()
    finally:
        training.kill()
    if status or None in (loaded, saving, evaluating, exporting):
        raise TrainingError(f"an uninterrupted run ended with status {status}; see {training.log}")
    assert loaded is not None
    assert evaluating is not None
    assert exporting is not None
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "load": loaded,
        "save": max(exporting - evaluating, 0.1) / 4,  # written while the last evaluation begins
        "evaluation": max(exporting - evaluating, 0.1),
        "export": time.monotonic() - started,
        "stages": [json.loads(line)["seconds"] for line in lines],
    }


def _scorers_of(trainer: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.name.isdigit() and int(_stat(entry)[1]) == trainer and _is_scorer(int(entry.name)):
                yield int(entry.name)


def _stat(entry: Path) -> list[str]:
    """Return a process's fields from its state and parent on, without its name, which may contain anything."""
    return (entry / "stat").read_text().rpartition(")")[2].split()


def _is_scorer(process: int) -> bool:
    entry = Path(f"/proc/{process}")
    try:
        return b"rewards_bridge" in (entry / "cmdline").read_bytes() and _stat(entry)[0] != "Z"
    except OSError:
        return False

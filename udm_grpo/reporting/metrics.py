"""Logs of a running training: metrics.jsonl, TensorBoard, Weights & Biases, the progress bar, stage times.

Files are always valid JSON. JSON has no NaN and no infinity: such a number is written as null, the line also gets
"nonfinite": {"kl": "nan"}, and the first one of each metric causes a warning.
"""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from rewards_bridge.redaction import redacted_texts
from udm_grpo.config import ConfigError, LoggingConfig
from udm_grpo.files.atomic import replace_file
from udm_grpo.reporting.wandb_run import open_wandb, wandb_problem


class JsonLines:
    """A file of JSON lines with strictly rising "step"; each line is flushed at once, so that a kill loses none.

    resume_after: None for a new file (an older one is renamed to NAME.1, NAME.2, ...); the step of the checkpoint that
    the run resumes from, to keep the lines up to and including that step. A torn last line is dropped; so, with a
    warning, is any other line that is not JSON with a step, or that another run wrote. run: the id in every line.
    """

    def __init__(self, path: str | Path, resume_after: int | None = None, run: str = ""):
        self.path, self._run = Path(path), run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        self._last: int | None = None
        if self.path.exists():
            if resume_after is None:
                self.path.rename(_unused(self.path))
            else:
                kept = self._read(resume_after)
        replace_file(self.path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Write {"step": step, **values}; raise ValueError for a step that is not larger than the one before."""
        if self._last is not None and step <= self._last:
            raise ValueError(f"{self.path}: step {step} after step {self._last}; every step is written once, in order")
        clean, nonfinite = to_json({"step": step, **({"run": self._run} if self._run else {}), **values})
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, resume_after: int) -> list[str]:
        lines = self.path.read_bytes().split(b"\n")
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                said = json.loads(line)
                step, run = int(said["step"]), said.get("run", self._run)
            except (ValueError, KeyError, TypeError, AttributeError):
                if line.strip() and number < len(lines):
                    warnings.warn(f"{self.path}: line {number} is damaged and was dropped", stacklevel=3)
                continue
            if self._run and run != self._run:
                warnings.warn(f"{self.path}: line {number} is of the run {run} and was dropped", stacklevel=3)
            elif step <= resume_after and (self._last is None or step > self._last):
                kept.append(line.decode() + "\n")
                self._last = step
        return kept


class MetricsWriter:
    """Writes the metrics of each step to OUTPUT_DIR/metrics.jsonl and, if asked, to TensorBoard and Weights & Biases.

    output_dir: created if missing; TensorBoard and Weights & Biases have folders with their names in it.
    resume_after: see JsonLines. config: shown in Weights & Biases, without secrets.
    primary: False in all processes but one; then nothing is written. run: the id in every line, and in TensorBoard.

    Raises ConfigError if TensorBoard is requested but not installed; a problem with Weights & Biases is a warning.
    """

    def __init__(
        self,
        output_dir: str | Path,
        logging: LoggingConfig | None = None,
        *,
        resume_after: int | None = None,
        config: Mapping[str, Any] | None = None,
        primary: bool = True,
        run: str = "",
    ):
        output_dir, logging = Path(output_dir), logging or LoggingConfig()
        output_dir.mkdir(parents=True, exist_ok=True)
        self._wandb = open_wandb(output_dir, resume_after, logging, config) if logging.wandb and primary else None
        self._tensorboard = _open_tensorboard(output_dir, resume_after) if logging.tensorboard and primary else None
        self._lines = JsonLines(output_dir / "metrics.jsonl", resume_after, run) if primary else None
        if self._tensorboard is not None and run:
            self._tensorboard.add_text("run", run, resume_after or 0)
        self._warned: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step's metrics: numbers, NumPy or JAX scalars, texts, lists, nested dictionaries; once per step."""
        if self._lines is None:
            return
        self._lines.append(step, metrics)
        numbers, nonfinite = to_json(_flat(metrics))
        for metric in nonfinite.keys() - self._warned:
            warnings.warn(
                f"step {step}: {metric} is {nonfinite[metric]}; written as null", RuntimeWarning, stacklevel=2
            )
        self._warned |= nonfinite.keys()
        numbers = {metric: value for metric, value in numbers.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for metric, value in numbers.items():
                self._tensorboard.add_scalar(metric, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})

    def picture(self, step: int, name: str, path: str | Path) -> None:
        """Show a PNG (see pictures.py) in TensorBoard and Weights & Biases, where they are on."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"step": step}, (name, Path(path)))

    def close(self) -> None:
        """Close all files."""
        if self._lines is not None:
            self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def check_tools(logging: LoggingConfig) -> None:
    """Raise ConfigError if TensorBoard is requested but not installed; warn of problems with Weights & Biases."""
    if logging.tensorboard:
        _summary_writer()
    if logging.wandb and (problem := wandb_problem()):
        print(f"warning: logging.wandb is True, but {problem}", file=sys.stderr, flush=True)


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard is True, but tensorboardX is not installed: pip install tensorboardX, or set "
            "logging.tensorboard=False."
        ) from None
    return SummaryWriter


def _open_tensorboard(output_dir: Path, resume_after: int | None) -> Any:
    purge_step = None if resume_after is None else resume_after + 1
    return _summary_writer()(str(output_dir / "tensorboard"), purge_step=purge_step)


class Progress:
    """A live bar on a terminal; plain lines elsewhere, one for every `plain_every` steps and one for the last.

    total, done: iterations of the whole run, and how many of them were done before. stream: default standard error.
    """

    def __init__(self, total: int, done: int = 0, *, plain_every: int = 1, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._total, self._first, self._done, self._plain_every = total, done, done, plain_every
        self._started = time.monotonic()
        live = self._stream.isatty()
        self._bar = tqdm(total=total, initial=done, file=self._stream, dynamic_ncols=True, unit="it") if live else None

    def update(self, metrics: Mapping[str, float], seconds: Mapping[str, float] | None = None) -> None:
        """Count one more iteration and show its metrics (such as reward, accuracy, kl) and its seconds per stage."""
        self._done += 1
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        if seconds:
            text += "  [" + " ".join(f"{stage} {spent:.1f}s" for stage, spent in seconds.items()) + "]"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._done % self._plain_every == 0 or self._done == self._total:
            each = (time.monotonic() - self._started) / (self._done - self._first)
            left = _duration(each * (self._total - self._done))
            self.message(f"{self._done}/{self._total}  {text}  {each:.2f} s/it  ETA {left}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and continue below it."""
        if self._bar is not None:
            self._bar.close()


class StageTimer:
    """Adds up wall-clock seconds by stage: `with timer("rollout"): ...`. A stage inside another counts in both.

    JAX returns before it has computed: a stage that should include the computation must wait for its result inside.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time until the end of the block, also of one that raises, to this stage."""
        self._seconds.setdefault(stage, 0.0)
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Return the seconds by stage since the last call, in the order the stages began, and start at zero."""
        taken, self._seconds = self._seconds, {}
        return taken


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a dictionary as JSON atomically; a number that is not finite becomes null (see the module docstring).

    Secrets are replaced by ***.
    """
    clean, nonfinite = to_json(value)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    text = json.dumps(redacted_texts(clean), indent=2, allow_nan=False) + "\n"
    replace_file(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_json(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values as plain JSON and, by name ("kl", "tags/colors"), those that were NaN or infinite: now None.

    NumPy and JAX arrays become numbers or lists, paths texts. Raises TypeError naming a value that is none of these.
    """
    nonfinite: dict[str, str] = {}
    return {str(name): _plain(value, str(name), nonfinite) for name, value in values.items()}, nonfinite


def _plain(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}/{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}/{i}", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX alike
        return _plain(value.tolist(), name, nonfinite)
    raise TypeError(f"{name} is {type(value).__name__}, which JSON cannot hold")


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _unused(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Check whether scorers are ready: packages, weights, device memory, and test images with known results."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards_bridge.errors import UsageError
from rewards_bridge.process import with_package
from rewards_bridge.scorers import SCORERS, Scorer, load_scorer, with_device
from rewards_bridge.scorers.torchvision_ops import declare_operators
from rewards_bridge.surroundings import environment_advice

_REQUIREMENTS = Path(__file__).parent / "requirements.txt"
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch", "skimage": "scikit-image"}
"""Module -> its name for pip, where the two differ."""


@dataclass(frozen=True)
class Checks:
    """How thoroughly to check a scorer, and what is known of its device."""

    device: str | None = None
    """For scorers that take a device, unless the options name one."""
    memory_gib: float | None = None
    """Device memory available to the scorer."""
    load: bool = True
    """Whether to load the scorer; if not, only packages and memory are checked."""
    example: bool = True
    """Whether wrong results on its test images mean that the scorer is not ready."""


def examine(name: str, options: Mapping[str, str], checks: Checks = Checks()) -> tuple[bool, list[str]]:
    """Return (whether the scorer is ready, one line for each step up to the first failure, with its fix)."""
    failed = failed_imports(name)
    if failed:
        return False, _import_lines(failed)
    enough, lines = _memory(name, options, checks.memory_gib)
    lines = ["packages: all installed", *lines]
    if not enough or not checks.load:
        return enough, lines
    try:
        options = with_device(name, options, checks.device)
        scorer = load_scorer(name, options)
    except Exception as error:  # of any library that the scorer uses
        reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        advice = environment_advice(error)
        remedy = [f"  fix: {advice}"] if advice else SCORERS[name].hint(options) if name in SCORERS else []
        return False, [*lines, f"weights: {reason}", *remedy]
    lines += ["weights: loaded", *_room(options.get("device", "cpu"))]
    try:
        right, verdict = check_example(name, scorer)
    except Exception as error:
        return False, [*lines, f"test images: {type(error).__name__}: {error}"]
    remedy = [] if right else ["  fix: use the weights and package versions that this scorer was written for"]
    if not checks.example and not right:
        remedy = ["  only a warning, because check_example is off"]
    return right or not checks.example, [*lines, f"test images: {verdict}", *remedy]


def _memory(name: str, options: Mapping[str, str], memory_gib: float | None) -> tuple[bool, list[str]]:
    """Return (whether the scorer fits into memory_gib, a line that says so)."""
    if name not in SCORERS or memory_gib is None:
        return True, []
    needed = SCORERS[name].memory_gib / (2 if options.get("dtype") in ("float16", "bfloat16") else 1)
    line = f"memory: needs about {needed:g} GiB; {memory_gib:.1f} GiB of its device are available"
    if needed <= memory_gib:
        return True, [line]
    return False, [line, "  fix: another device, a larger memory_fraction, or the options dtype=bfloat16 or batch_size"]


def check_example(name: str, scorer: Scorer) -> tuple[bool, str]:
    """Return (whether the scorer's results on its test images are right, a description); raises as the scorer does."""
    from rewards_bridge.examples import example  # needs Pillow, which not every scorer does

    try:
        known = example(name)
    except ImportError as error:
        return False, f"not installed ({error}); fix: {sys.executable} -m pip install {pin('skimage')}"
    if known is None:
        return True, "none for a scorer of your own"
    scores = known.score(scorer)
    marks = ", ".join(f"{mark:.4g}" for mark in scores.score.tolist())
    if known.is_right(scores):
        return True, f"as expected ({known.expected}); scores {marks}"
    raw = {key: [round(float(value), 4) for value in values] for key, values in scores.raw.items()}
    return False, f"expected that {known.expected}; the scores are {marks}, raw {raw}"


def failed_imports(name: str) -> dict[str, Exception]:
    """Return the scorer's modules that this interpreter cannot import, with their errors."""
    failed: dict[str, Exception] = {}
    for module in SCORERS[name].packages if name in SCORERS else ():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if module == "torchvision":
                    declare_operators()
                importlib.import_module(module)
        except Exception as error:  # of any type: a package may be installed but broken
            failed[module] = error
    return failed


def _import_lines(failed: Mapping[str, Exception]) -> list[str]:
    """Return lines that name each missing or broken package, and each one that the environment breaks, with its fix."""

    def install(modules: Sequence[str]) -> str:
        return shlex.join([sys.executable, "-m", "pip", "install", *(pin(module) for module in modules)])

    lines = []
    missing = [name for name, error in failed.items() if isinstance(error, ModuleNotFoundError) and error.name == name]
    if missing:
        lines += [f"packages: {', '.join(missing)} cannot be imported: not installed", f"  fix: {install(missing)}"]
    for module, error in failed.items():
        if module not in missing:
            reason = (str(error).splitlines() or [""])[0][:300]
            lines.append(f"packages: {module} is installed but cannot be imported ({type(error).__name__}: {reason})")
            lines.append(f"  fix: {environment_advice(error) or install([module])}")
    return lines


def pin(module: str) -> str:
    """Return the pinned requirement of a module."""
    distribution = DISTRIBUTIONS.get(module, module)
    for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.split("==")[0].lower() == distribution.lower():
            return requirement
    return distribution


def _room(device: str) -> Iterator[str]:
    """Yield a line with the free memory of a CUDA device once the weights are on it."""
    if not device.startswith("cuda"):
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    yield f"device: {device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free with the weights loaded"


def report(names: list[str], options: Mapping[str, str], checks: Checks = Checks()) -> int:
    """Examine these scorers (all known ones if none is named) and print the results; 0 if all are ready, else 1.

    Raises UsageError for options unless exactly one scorer is named.
    """
    if options and len(names) != 1:
        raise UsageError("options apply to a single scorer: name it with --scorer, or leave the options out")
    ready = True
    for name in names or sorted(SCORERS):
        fine, lines = examine(name, options, checks)
        ready = ready and fine
        print("\n".join([f"{name}: {'ready' if fine else 'not ready'}", *(f"  {line}" for line in lines)]), flush=True)
    return 0 if ready else 1


def hand_over(config: str, rest: Sequence[str]) -> int:
    """Run the trainer's doctor on a training configuration and return its exit status; UsageError without udm_grpo."""
    if importlib.util.find_spec("udm_grpo") is None:
        raise UsageError(f"--config needs udm_grpo, which {sys.executable} does not have; use the trainer's Python")
    command = [sys.executable, "-m", "udm_grpo.doctor", "--config", config, *rest]
    return subprocess.run(command, env=with_package(os.environ)).returncode

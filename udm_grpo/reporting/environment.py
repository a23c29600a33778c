"""environment.json: where, when, with which versions and by which command a run was started; without secrets."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from udm_grpo.files.redaction import without_secrets
from udm_grpo.reporting.metrics import write_json

FILE = "environment.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def begin(
    output: Path, resume_after: int | None, run: str = "", origin: Mapping[str, str | None] | None = None
) -> None:
    """Record a start in OUTPUT/environment.json.

    resume_after: None for a fresh run, else the step it resumes from. run: its id. origin: the run and the checkpoint
    of another folder that it resumes from.
    """
    earlier = [] if resume_after is None else _starts(output / FILE)
    start = {"after_step": resume_after or 0, **({"origin": origin} if origin else {}), **describe()}
    write_json(output / FILE, {**({"run": run} if run else {}), "starts": [*earlier, start]})


def describe() -> dict[str, Any]:
    """Describe this process and its machine: time (UTC), command, versions, devices, processors, bytes of memory."""
    devices = jax.devices()
    kinds = Counter(f"{device.platform}: {device.device_kind}" for device in devices)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": " ".join(without_secrets(sys.orig_argv)),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": dict(kinds),
        "device_memory_bytes": _device_memory(devices[0]),
        "backend": devices[0].client.platform_version,
        "processes": jax.process_count(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
    }


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [dict(start) for start in content["starts"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{path} is damaged; it is rewritten with this start only", stacklevel=3)
        return []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """Return the commit of these sources and whether they were changed since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _device_memory(device: jax.Device) -> int | None:
    """Return the bytes of memory of a device; None if the backend does not report them."""
    stats: Mapping[str, int] = device.memory_stats() or {}
    return stats.get("bytes_limit")


def _memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

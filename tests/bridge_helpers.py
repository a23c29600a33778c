"""Helpers for the tests of the bridge."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rewards_bridge.client import BridgeConfig

TESTS = Path(__file__).resolve().parent
ENVIRONMENT = {"PYTHONPATH": str(TESTS)}


def config(scorer: str, **fields: Any) -> BridgeConfig:
    """Return a client config, with short time limits, for a scorer of bridge_scorers.py in its own process."""
    own = {"environment": ENVIRONMENT} if fields.get("address") is None else {}
    defaults: dict[str, Any] = {"deadline_s": 20.0, "start_timeout_s": 20.0, "max_restarts": 1, **own}
    return BridgeConfig(scorer=f"bridge_scorers:{scorer}", **{**defaults, **fields})


def batch(first: int, count: int, size: int = 8, **metadata: Any) -> tuple[np.ndarray, list[str], list[dict]]:
    """Return images with the numbers first, first + 1, ... in their first two bytes, prompts and metadata."""
    images = np.random.default_rng(first).integers(0, 256, (count, size, size, 3), np.uint8)
    numbers = np.arange(first, first + count)
    images[:, 0, 0, 0] = numbers % 256
    images[:, 0, 0, 1] = numbers // 256
    return images, [f"prompt {number}" for number in numbers], [{"number": int(n), **metadata} for n in numbers]


@contextlib.contextmanager
def running_server(scorer: str, listen: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server and yield its process and the address that it prints."""
    command = [sys.executable, "-m", "rewards_bridge", "serve", "--scorer", f"bridge_scorers:{scorer}"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    with subprocess.Popen(
        [*command, "--listen", listen, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " serving on " in line, f"the server printed {line!r}"
            yield process, line.split()[-1]
        finally:
            if process.poll() is None:
                process.kill()


def is_running(pid: int) -> bool:
    """Return whether this process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Return whether the process ends within this time."""
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that this one started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def socket_of(server: int) -> Path:
    """Return the unix socket on the command line of a server."""
    arguments = Path(f"/proc/{server}/cmdline").read_text().split("\0")
    return Path(arguments[arguments.index("--listen") + 1].removeprefix("unix:"))

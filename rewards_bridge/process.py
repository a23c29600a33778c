"""A scorer process that we own: started on a private socket, monitored, and stopped with all its children."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards_bridge.environment import allowed_environment
from rewards_bridge.options import as_line
from rewards_bridge.redaction import redacted

TAIL_BYTES = 16 << 10
_PACKAGE = Path(__file__).resolve().parent


class ScorerProcess:
    """`python -m rewards_bridge` with its own interpreter and environment, which ends when this process ends.

    words: its arguments, with which it must serve until its standard input is closed.
    """

    def __init__(
        self,
        words: Sequence[str],
        interpreter: str | None,
        environment: Mapping[str, str],
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process; options: the scorer's options, passed over standard input."""
        line = as_line(options or {})
        self._tail = b""
        # No preexec_fn: it would make Python run fork handlers, which the threads of JAX and gRPC would not survive.
        self._process = subprocess.Popen(
            [interpreter or sys.executable, "-m", "rewards_bridge", *words],
            stdin=subprocess.PIPE,  # closing it tells the server that this process has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=scorer_environment(environment, options or {}),
            start_new_session=True,
        )
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # it has already ended, which the next check detects
                self._process.stdin.write(line)
                self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read_output, name="scorer-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def exit_code(self, wait_s: float = 0.0) -> int | None:
        """Return the exit code after waiting at most wait_s; None while the process is running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait_s)
        return None

    def describe(self) -> str:
        """Return how the process ended, and the end of its output."""
        code = self.exit_code()
        if code is None:
            state = "is still running"
        elif code < 0:
            state = f"was killed by {signal.Signals(-code).name} (exit code {code})"
        else:
            state = f"exited with exit code {code}"
        return f"the scorer process {self.pid} {state}; {self.tail()}"

    def tail(self) -> str:
        """Return the end of what the process wrote to stdout and stderr."""
        if self.exit_code() is not None:
            self._reader.join(1.0)
        text = redacted(self._tail.decode(errors="replace").rstrip())
        return f"the end of its output:\n{text}" if text else "it wrote nothing"

    def stop(self, grace_s: float) -> None:
        """Terminate the process; after grace_s, kill it and its children."""
        if grace_s > 0 and self.exit_code() is None:
            self._process.terminate()
            self.exit_code(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _read_output(self) -> None:
        stream = self._process.stdout
        if stream is None:
            return
        with stream:
            while chunk := os.read(stream.fileno(), 65536):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]


def scorer_environment(extra: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a scorer process: the allowed part of ours, the path of this package, and `extra`."""
    # Idle threads leave the cores to XLA and busy ones use at most half of them, unless the environment says otherwise.
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    merged = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads, **allowed_environment(extra, options)}
    return with_package(merged)


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with this package on PYTHONPATH."""
    path = os.pathsep.join(filter(None, (str(_import_folder()), environment.get("PYTHONPATH"))))
    return {**environment, "PYTHONPATH": path}


@functools.cache
def _import_folder() -> Path:
    """Return the folder from which the scorer's interpreter imports this package.

    It is never site-packages, whose other packages belong to our interpreter: a folder with a link replaces it.
    """
    if _PACKAGE.parent.name not in ("site-packages", "dist-packages"):
        return _PACKAGE.parent
    folder = Path(tempfile.mkdtemp(prefix="rewards-bridge-import-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / _PACKAGE.name).symlink_to(_PACKAGE, target_is_directory=True)
    return folder

"""The identity of a process, by which others, also on other machines, can tell whether it still runs."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def process_identity() -> dict[str, Any]:
    """Return what identifies this process: host, pid, when it and its machine started, its command."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "command": _command(),
    }


def runs_here(identity: dict[str, Any]) -> bool | None:
    """Return whether a process of this machine still runs; None if it is of another machine, or if that is unknown.

    A pid alone is not enough: it is reused, and in containers it is always 1. So the machine is identified by the start
    of its kernel and the namespace of process ids, and the process by its start time.
    """
    pid = identity.get("pid")
    if not isinstance(pid, int) or pid < 1 or not identity.get("machine") or identity["machine"] != _machine():
        return None
    if Path("/proc/self/stat").exists():
        return _started(pid) is not None and _started(pid) == identity.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _machine() -> str:
    """Return a text that only processes with the same start of the kernel and the same pid namespace share."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "" if sys.platform == "linux" else socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the start of the kernel; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _command() -> str:
    """Return the program without its arguments, which may contain secrets."""
    words = [word for word in sys.orig_argv if word]
    if "-m" in words[:-1]:
        return f"python -m {words[words.index('-m') + 1]}"
    return Path(sys.argv[0] or "python").name

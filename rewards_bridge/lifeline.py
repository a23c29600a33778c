"""End a server when the trainer that started it ends for any reason: the trainer holds our standard input open."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE_S = 3.0


def exit_with_parent(stop: Callable[[], None]) -> None:
    """Call stop once standard input is closed; if the process still runs after GRACE_S, kill it and its children."""
    threading.Thread(target=_watch, args=(stop,), name="lifeline", daemon=True).start()


def _watch(stop: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    timer = threading.Timer(GRACE_S, kill_group)
    timer.daemon = True
    timer.start()
    stop()


def kill_group() -> None:
    """Kill this process, and its children if it leads a process group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)

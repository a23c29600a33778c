"""Signals that ask a run to stop while its modules are imported, which takes seconds: noted, and heard afterwards."""

import os
import signal
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to stop."""
AT_ONCE_STATUS = 128 + signal.SIGINT
"""Exit status after a second Ctrl-C, as shells give it."""
_noted: list[int] = []
_before: dict[int, Any] = {}


def note_signals() -> None:
    """Note these signals from here on, but for those that were ignored when the process started."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            _before[number] = signal.signal(number, _note)


def heard() -> str:
    """Stop noting, and return the name of the first signal that came; "" if none did."""
    for number, handler in _before.items():
        default = number == signal.SIGINT and handler == signal.SIG_DFL
        signal.signal(number, signal.default_int_handler if default else handler)
    _before.clear()
    first = signal.Signals(_noted[0]).name if _noted else ""
    _noted.clear()
    return first


def _note(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and number in _noted:
        os._exit(AT_ONCE_STATUS)
    _noted.append(number)

"""Record stop signals that arrive during the imports of a run, which take seconds, and hand them over afterwards."""

import os
import signal
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to stop."""
AT_ONCE_STATUS = 128 + signal.SIGINT
"""Exit status after a second Ctrl-C, by the convention of shells."""
_noted: list[int] = []
_before: dict[int, Any] = {}


def note_signals() -> None:
    """Start recording stop signals, except those that were ignored when the process started."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            _before[number] = signal.signal(number, _note)


def heard() -> str:
    """Stop recording, and return the name of the first signal received; "" if there was none."""
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

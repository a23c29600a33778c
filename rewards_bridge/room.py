"""How much may wait at a time: whoever brings more waits until there is room, in the order in which they came."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

LOOK_S = 1.0
"""How often whoever waits looks whether it still has to."""


class Room:
    """Room for so many bytes. What is larger than all of it gets in when nothing else is there."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._queue: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()

    def enter(self, size: int, is_over: Callable[[], bool]) -> bool:
        """Wait until there is room and take it; False, and nothing taken, as soon as is_over() while waiting."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or (self._used and self._used + size > self._size):
                    if is_over():
                        return False
                    self._changed.wait(LOOK_S)
                self._used += size
                return True
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def squeeze_in(self, size: int) -> None:
        """Take room without waiting, for what is in memory already."""
        with self._changed:
            self._used += size

    def leave(self, size: int) -> None:
        """Give room back."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def look(self) -> None:
        """Have everybody who waits ask is_over() at once."""
        with self._changed:
            self._changed.notify_all()

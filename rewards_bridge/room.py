"""A limit on the bytes that may wait at a time; callers block, in order of arrival, until there is room."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

LOOK_S = 1.0
"""How often a waiting caller checks is_over()."""


class Room:
    """Room for `size` bytes. An item larger than that enters when the room is empty."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._queue: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()

    def enter(self, size: int, is_over: Callable[[], bool]) -> bool:
        """Wait for room and take it; return False, having taken none, once is_over() while waiting."""
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
        """Take room without waiting, for data that is already in memory."""
        with self._changed:
            self._used += size

    def leave(self, size: int) -> None:
        """Release room."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def look(self) -> None:
        """Make all waiting callers check is_over() now."""
        with self._changed:
            self._changed.notify_all()

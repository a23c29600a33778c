"""Standard streams that may break while a program runs: `| head -1`, a dropped ssh connection, a full disk.

Output that can no longer be written is dropped, and the program continues.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STREAMS = ("stdin", "stdout", "stderr")
"""In the order of their file descriptors."""


class LastingStream:
    """A text stream that ignores write errors: after the first, its descriptor leads to /dev/null."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it if the stream is broken."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop its buffer."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            _lead_nowhere(self._stream.fileno())
            self._stream.flush()  # text in its buffer would fail again when the program ends


def prepare_streams() -> None:
    """Open standard descriptors that the caller has closed; call this first.

    The next file that is opened would get a closed descriptor, and would then receive what libraries print.
    """
    for descriptor, name in enumerate(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            _lead_nowhere(descriptor)
            if descriptor:
                stream = os.fdopen(descriptor, "w", encoding="utf-8", closefd=False)
                setattr(sys, name, stream)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Ignore errors of writing to stdout or stderr inside the block."""
    before = sys.stdout, sys.stderr
    lasting: tuple[Any, Any] = (LastingStream(sys.stdout), LastingStream(sys.stderr))
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)

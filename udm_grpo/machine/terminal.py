"""Standard streams that may go away while a program runs: `| head -1`, a dropped ssh connection, a full disk.

What cannot be written there any more is dropped, and the program continues.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

STREAMS = ("stdin", "stdout", "stderr")
"""By their file descriptors."""


class LastingStream:
    """A text stream whose failures to write are no errors: after the first, its descriptor leads to /dev/null."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it where nobody reads any more."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it held."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            _lead_nowhere(self._stream.fileno())
            self._stream.flush()  # what it still holds would fail again when the program ends


def prepare_streams() -> None:
    """Open descriptors that the caller has closed; call it first.

    A descriptor that is closed would go to the next file that is opened, which would then receive what libraries print.
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
    """For the length of the block, let no failure to write to stdout or stderr be an error."""
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

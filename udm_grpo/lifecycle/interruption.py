"""Signal handling of a run: which signals ask it to stop, which it survives, and how it receives them.

| signal | sent by | what happens |
|---|---|---|
| SIGTERM | a preemption, a scheduler's time limit, `kill` | the run stops with everything saved |
| SIGUSR1 | a scheduler's advance warning (`sbatch --signal=USR1@300`) | the same |
| SIGINT, the first | Ctrl-C | the same |
| SIGINT, the second | Ctrl-C | the process exits immediately, with status 130 |
| SIGHUP | a closed terminal, a dropped ssh connection | the run continues |

A signal that was ignored when the process started (`nohup`, a shell's background job) stays ignored. The main thread
may be busy with a compilation or a computation for minutes, so a separate thread reads the signals and responds.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import jax

from rewards_bridge.errors import UserError
from udm_grpo.lifecycle.early_signals import AT_ONCE_STATUS, STOPPING
from udm_grpo.multihost import hosts

SURVIVED = (signal.SIGHUP,)
MAX_TEXT = 4000
"""Maximum length, in characters, of an error message sent to the other processes."""


class StopRequestedError(Exception):
    """The run was asked to stop, and no work in progress would be lost."""


class OtherProcessError(UserError, RuntimeError):
    """Another process of this run has failed in work that it does alone, reported at a point that all reach."""


@dataclass
class Interruption:
    """Whether this process was asked to stop, and by which signal, or has failed in work that it does alone."""

    requested: bool = False
    by: str = ""
    problem: Exception | None = None
    """The first error that `held` has caught."""
    failed_together: bool = False
    """Whether `check` has raised a problem in all processes at the same point."""

    def check(self) -> None:
        """Raise, in all processes, StopRequestedError if any was asked to stop, or the error that `held` has caught.

        A process that has no error of its own raises an OtherProcessError with those of the others.
        """
        if not hosts.any_process(self.requested or self.problem is not None):
            return
        problem = self.problem
        texts = hosts.gather(None if problem is None else f"{type(problem).__name__}: {str(problem)[:MAX_TEXT]}")
        lines = [f"process {process}: {text}" for process, text in enumerate(texts) if text is not None]
        if not lines:
            raise StopRequestedError
        self.failed_together = True
        raise OtherProcessError("; ".join(lines)) if problem is None else problem

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold back an error in work that one process does alone, such as writing files, until all processes `check`.

        Meanwhile the others compute, and would wait forever for a process that has exited. With a single process the
        error is raised immediately.
        """
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.problem = self.problem or error

    def request(self, number: int) -> None:
        """Record a signal that asks the run to stop."""
        self.requested, self.by = True, self.by or signal.Signals(number).name


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Handle the signals of the table above within the block."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may set signal handlers
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number in STOPPING:
            asked.request(number)

    heard = [number for number in (*STOPPING, *SURVIVED) if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    listener = threading.Thread(target=_listen, args=(reader, asked), name="signals", daemon=True)
    listener.start()
    before = {number: signal.signal(number, note) for number in heard}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        listener.join()
        reader.close()


def ignore_stopping() -> None:
    """Ignore stop signals until the process exits.

    For a run that is over: while the interpreter shuts down, such a signal would still change the exit status.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _listen(reader: socket.socket, asked: Interruption) -> None:
    announced = interrupted = False
    while numbers := reader.recv(64):
        for number in numbers:
            if number in SURVIVED:
                _say(f"{signal.Signals(number).name}: the terminal was closed; the run continues")
            elif number not in STOPPING:
                continue
            elif number == signal.SIGINT and interrupted:
                _say("second Ctrl-C: exiting immediately; the last checkpoint is kept")
                os._exit(AT_ONCE_STATUS)
            else:
                if not announced or number == signal.SIGINT:
                    more = " (press Ctrl-C again to exit immediately)" if number == signal.SIGINT else ""
                    _say(f"{signal.Signals(number).name}: stopping as soon as everything can be saved{more}")
                asked.request(number)
                announced, interrupted = True, interrupted or number == signal.SIGINT


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)

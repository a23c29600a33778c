"""What a run does with signals: which ask it to stop, which it survives, and how it hears of them.

| signal | sent by | what happens |
|---|---|---|
| SIGTERM | a preemption, a scheduler's time limit, `kill` | the run stops with everything saved |
| SIGUSR1 | a scheduler's early notice (`sbatch --signal=USR1@300`) | the same |
| SIGINT, the first | Ctrl-C | the same |
| SIGINT, the second | Ctrl-C | the process ends at once, with status 130 |
| SIGHUP | a terminal that has gone, a dropped ssh connection | the run continues |

A signal that was ignored when the process started (`nohup`, a shell's background job) stays ignored. The main thread
may be inside of a compilation or a computation for minutes, so a thread of its own reads the signals and answers.
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
"""Characters of an error that the other processes are told."""


class StopRequestedError(Exception):
    """The run was asked to stop and nothing is under way that would be lost."""


class OtherProcessError(UserError, RuntimeError):
    """Another process of this run has failed in what it does by itself, and says so at a point that all reach."""


@dataclass
class Interruption:
    """Whether this process was asked to stop, and by which signal, or has failed in what it does by itself."""

    requested: bool = False
    by: str = ""
    problem: Exception | None = None
    """What `held` has caught."""
    failed_together: bool = False
    """Whether `check` has raised a problem, in all processes at the same point."""

    def check(self) -> None:
        """Raise, in all processes alike, StopRequestedError if any was asked to stop, or what `held` has caught.

        Where that was in other processes only, an OtherProcessError says what and in which.
        """
        if not hosts.any_process(self.requested or self.problem is not None):
            return
        problem = self.problem
        told = hosts.gather(None if problem is None else f"{type(problem).__name__}: {str(problem)[:MAX_TEXT]}")
        lines = [f"process {process}: {text}" for process, text in enumerate(told) if text is not None]
        if not lines:
            raise StopRequestedError
        self.failed_together = True
        raise OtherProcessError("; ".join(lines)) if problem is None else problem

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep an error of what a process does by itself, such as writing files, until all of them `check`.

        The others meanwhile compute, and would wait for a process that has left. With one process it is raised at once.
        """
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.problem = self.problem or error

    def request(self, number: int) -> None:
        """Note a signal that asks the run to stop."""
        self.requested, self.by = True, self.by or signal.Signals(number).name


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Listen to the signals of the table above for the length of the block."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may take signals
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
    """Ignore what asks a run to stop, from here to the end of the process.

    For a run that is over: until the interpreter has ended, such a signal would still change the exit status.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _listen(reader: socket.socket, asked: Interruption) -> None:
    announced = interrupted = False
    while numbers := reader.recv(64):
        for number in numbers:
            if number in SURVIVED:
                _say(f"{signal.Signals(number).name}: the terminal has gone; the run continues")
            elif number not in STOPPING:
                continue
            elif number == signal.SIGINT and interrupted:
                _say("second Ctrl-C: ended at once; the last checkpoint stays")
                os._exit(AT_ONCE_STATUS)
            else:
                if not announced or number == signal.SIGINT:
                    more = " (Ctrl-C again ends it at once)" if number == signal.SIGINT else ""
                    _say(f"{signal.Signals(number).name}: stopping as soon as everything can be saved{more}")
                asked.request(number)
                announced, interrupted = True, interrupted or number == signal.SIGINT


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)

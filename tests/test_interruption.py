"""Which signals ask a run to stop, and which it survives."""

import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT

from udm_grpo.interruption import AT_ONCE_STATUS, StopRequestedError, interruption

WAITING = """
import hashlib
from udm_grpo.interruption import interruption
with interruption() as asked:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # the main thread runs none of Python's handlers in here
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_wish_inside_the_block_only(number, capsys):
    before = signal.getsignal(number)
    with interruption() as asked:
        asked.check()
        os.kill(os.getpid(), number)
        assert asked.requested
        assert asked.by == number.name
        with pytest.raises(StopRequestedError):
            asked.check()
    assert signal.getsignal(number) == before
    assert f"{number.name}: stopping as soon as everything can be saved" in capsys.readouterr().err


def test_a_terminal_that_has_gone_does_not_end_a_run(capsys):
    with interruption() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asked.requested
    assert "SIGHUP: the terminal has gone; the run continues" in capsys.readouterr().err


def test_what_was_ignored_from_the_start_stays_ignored():
    """As `nohup` and a shell's background jobs have it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_ends_the_process_at_once():
    """Also while the main thread is busy for long, as in a compilation."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == AT_ONCE_STATUS == 130
    assert "Ctrl-C again ends it at once" in said
    assert "Traceback" not in said

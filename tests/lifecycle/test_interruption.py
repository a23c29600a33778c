"""Tests of which signals ask a run to stop and which it survives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, SMOKE

from udm_grpo.lifecycle.interruption import AT_ONCE_STATUS, StopRequestedError, interruption

WAITING = """
import hashlib
from udm_grpo.lifecycle.interruption import interruption
with interruption() as asked:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # meanwhile the main thread runs no Python signal handlers
"""

COMMAND = """
import sys, time
from rewards_bridge.redaction import guarded
def main():
    print("ready", flush=True)
    time.sleep(20)
sys.exit(guarded(main))
"""
OVER = """
import os, sys, time
from udm_grpo.lifecycle.interruption import ignore_stopping
class Late:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ready\\n")
        sleep(1)
late = Late()
ignore_stopping()
sys.exit(0)
"""
QUIET = {"JAX_PLATFORMS": "cpu"}


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
    assert "SIGHUP: the terminal was closed; the run continues" in capsys.readouterr().err


def test_what_was_ignored_from_the_start_stays_ignored():
    """`nohup` and background jobs of a shell start processes with ignored signals."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_ctrl_c_ends_the_process_at_once():
    """It does so even while the main thread is busy for a long time, such as in a compilation."""
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
    assert "press Ctrl-C again to exit" in said
    assert "Traceback" not in said


def interrupted(program: str, delay: float = 0.5) -> subprocess.CompletedProcess[str]:
    """Run a program that says when it is ready, and send SIGINT to it after `delay` seconds."""
    words, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | QUIET, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_is_heard_after_them(number, tmp_path):
    """The run exits with the status that the scheduler expects, before anything is written."""
    words = [sys.executable, "-m", "udm_grpo.train", "--config", SMOKE, f"--config.output_dir={tmp_path / 'run'}"]
    words.append("--config.checkpoint.stopped_status=75")
    status, said = signalled_in_imports(words, number)
    assert status == 75
    assert said.splitlines()[-1] == f"stopped by {number.name} before anything was started"
    assert not (tmp_path / "run").exists()


def test_ctrl_c_during_the_imports_of_another_command_is_no_traceback():
    words = [sys.executable, "-m", "udm_grpo.convert", "--help"]
    assert signalled_in_imports(words, signal.SIGINT) == (-signal.SIGINT, "")


def signalled_in_imports(words: list[str], number: int) -> tuple[int, str]:
    """Send a signal to a command while it imports JAX; return its exit status and what it wrote to stderr."""
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | QUIET, stderr=subprocess.PIPE, text=True) as process:
        while "jaxlib" not in (Path("/proc") / str(process.pid) / "maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        said = process.stderr.read()
    return process.returncode, said


def test_ctrl_c_ends_a_command_without_a_traceback():
    done = interrupted(COMMAND)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted\n")


def test_a_run_that_is_over_keeps_its_exit_status():
    """It does so even during interpreter shutdown, when Python no longer calls its handlers."""
    done = interrupted(OVER, delay=0.2)
    assert (done.returncode, done.stderr) == (0, "")


COMMANDS = [path for folder in ("udm_grpo", "rewards_bridge", "scripts") for path in (ROOT / folder).rglob("*.py")]
COMMANDS = [
    path for path in COMMANDS if '__name__ == "__main__"' in path.read_text() and path.name != "torch_reference.py"
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_is_guarded(path):
    assert path.read_text().rstrip().endswith("sys.exit(guarded(main))") or "status = guarded(main)" in path.read_text()

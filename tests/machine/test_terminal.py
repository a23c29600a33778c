"""Standard streams that break while a program runs."""

import subprocess
import sys

import pytest
from running import ROOT

PROGRAM = """
import os, sys
from udm_grpo.machine.terminal import lasting_streams, prepare_streams
prepare_streams()
with lasting_streams():
    for number in range(2000):
        print(number, "x" * 100)
        print(number, "x" * 100, file=sys.stderr, flush=True)
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    os.write(2, b"from a library")
    os.write(file, b"done")
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_program_whose_reader_has_gone_ends_well(tmp_path, closed):
    """For example, with `| head -1` and `2>&1 | head -1`."""
    nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "file")],
        cwd=ROOT,
        stdout=nowhere if closed == "stderr" else pipe,
        stderr=nowhere if closed == "stdout" else (subprocess.STDOUT if closed == "both" else pipe),
    )
    stream = process.stdout or process.stderr
    stream.readline()
    stream.close()
    assert process.wait(30) == 0
    assert (tmp_path / "file").read_text() == "done"


def test_descriptors_that_are_closed_from_the_start_go_to_no_file(tmp_path):
    """Text that a library prints to descriptor 2 must not end up in a file that was opened."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(["bash", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "bash", *command], cwd=ROOT, timeout=30)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "done"

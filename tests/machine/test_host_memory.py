"""Freed memory is kept on CPU, unless the environment chooses an allocator or its settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from udm_grpo.machine import host_memory
from udm_grpo.machine.host_memory import may_have_accelerators

PAGES = """
import resource
from udm_grpo.machine.host_memory import keep_freed_memory
print(keep_freed_memory())
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(200 << 20)
    block[:] = b"1" * len(block)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""


def pages(**variables: str) -> tuple[str, int]:
    """Whether memory is kept, and how many pages the system cleared for the second of two equal blocks."""
    environment = {name: value for name, value in os.environ.items() if name not in host_memory.OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", PAGES],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is an allocator of Linux")
def test_a_second_block_needs_no_new_pages():
    assert pages() == ("True", pytest.approx(0, abs=1000))
    kept, count = pages(MALLOC_ARENA_MAX="2")
    assert kept == "False"
    assert count > 10_000


def test_accelerators_are_seen_by_their_device_files(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(host_memory, "Path", lambda _: tmp_path)
    assert may_have_accelerators(None)
    assert may_have_accelerators("cuda,cpu")
    assert not may_have_accelerators("cpu")
    (tmp_path / "nvidia0").unlink()
    assert not may_have_accelerators(None)
    assert Path("/dev").is_dir()

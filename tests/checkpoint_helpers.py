"""Helpers of the checkpoint tests: compare training states bit by bit, and run test files as programs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]


def assert_same(left: Any, right: Any) -> None:
    """Assert that two states are equal: structure, types, dtypes and every bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def change_a_number(checkpoint: Path, numbers: np.ndarray) -> None:
    """Change one of these neighbouring numbers in the files of a checkpoint, as a failing disk does: sizes stay."""
    for file in Path(checkpoint).rglob("d/*"):
        content = bytearray(file.read_bytes())
        if (at := content.find(numbers.tobytes())) >= 0:
            content[at] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError(f"no file of {checkpoint} holds these numbers")


def run_file(file: str, *arguments: str, devices: int = 1, **options: Any) -> subprocess.Popen:
    """Start a test file as a program on `devices` virtual CPU devices."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, file, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for a process that must succeed; return its output."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output

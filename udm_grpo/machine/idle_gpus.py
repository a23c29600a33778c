"""NVIDIA GPUs of this machine that JAX does not use."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

from udm_grpo.machine.gpus import VISIBLE, hides_all, query_gpus

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/gpus")


def idle_gpus(backend: str) -> str | None:
    """Return what to install if there are NVIDIA GPUs but JAX's backend is the CPU; None if nothing is wrong.

    It is also None if the user chose the CPU, by JAX_PLATFORMS or by a CUDA_VISIBLE_DEVICES that hides all GPUs.
    """
    chosen = "cpu" in os.environ.get("JAX_PLATFORMS", "").lower()
    if backend != "cpu" or chosen or hides_all(os.environ.get(VISIBLE)):
        return None
    gpus = _gpus()
    if not gpus:
        return None
    there = f"This machine has {len(gpus)} NVIDIA GPU(s) ({gpus[0]}), but JAX computes on the CPU"
    if importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_cuda12_plugin"):
        return f"{there} although its CUDA plugin is installed: check that nvidia-smi shows driver 580 or newer."
    return f'{there}: its CUDA plugin is missing. Fix: pip install "jax[cuda13]=={version("jax")}"'


def _gpus() -> list[str]:
    """Return the names of the GPUs, from nvidia-smi or else from the driver's files."""
    rows = query_gpus(os.environ)
    if rows is not None:
        return [row.name for row in rows]
    if DRIVER.is_dir():
        return [path.name for path in sorted(DRIVER.iterdir())]
    return [path.name for path in sorted(DEVICES.glob("nvidia[0-9]*"))]

"""The devices to compile for: those at hand, or a TPU slice or GPUs that need not be present."""

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from rewards_bridge.errors import UserError

TESTED = ("v5e:4x4", "v5p:2x2x2", "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x1")
"""Topology names that were tried and that libtpu accepts."""

GIB = 2**30
USABLE_HBM = {
    "TPU v4": 15.25,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
}
"""Kind of a device -> GiB that a program may use, as the compiler of libtpu 0.0.42.1 reports it when one is too large.

Published per chip: v4 32 GB, v5e 16 GB, v5p 95 GB, v6e 32 GB, tpu7x 192 GB (docs.cloud.google.com/tpu/docs). A v4 chip,
under this name, and a tpu7x chip appear as two devices with half of it each.
"""


@dataclass(frozen=True)
class Gpu:
    """What distinguishes GPUs of one architecture."""

    kind: str
    """Its name, as the driver reports it."""
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes of memory that can be read or written in a second."""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352_320_000_000),
    "h200": Gpu("NVIDIA H200", 143_771 * 2**20, 4_800_000_000_000),
}
"""Name in --topology -> a GPU of the Hopper generation (SXM).

The H100's numbers are XLA's own description of it; the H200's memory is what nvidia-smi reports, its bandwidth that of
NVIDIA's data sheet.
"""
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""
"""What XLA's compiler has to know of a GPU."""
GPU_FRACTION = 0.75
"""Fraction of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""
_NO_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""Compiler options without a GPU, where kernels cannot be timed to choose the fastest."""

_QUIET = {
    # libtpu asks which TPU the machine has; any well-formed answer will do, since the compiler does not use it.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling does not occupy a TPU, so several processes may compile at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class TopologyError(UserError, ValueError):
    """A slice that cannot be compiled for; the message says what to change."""


def devices_of(topology: str) -> list[Any]:
    """Return the devices of a slice such as "v5p:2x2x4" or "h200:8", or those at hand for "". Raises TopologyError."""
    if not topology:
        return list(jax.devices())
    if topology.partition(":")[0] in GPUS:
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology={topology} needs the TPU compiler, which is not part of jax; fix: pip install "
            f"'{libtpu_series()}'. Without --topology, the programs are compiled for the devices at hand."
        )
    _check_libtpu(topology)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TopologyError(
            f"--topology={topology}: libtpu knows no such slice ({reason}); name one as kind:chips, such as "
            f"{', '.join(TESTED)}."
        ) from None


def libtpu_series() -> str:
    """Return the releases of libtpu that the installed jax requires for TPUs, such as "libtpu==0.0.42.*"."""
    named = (line for line in importlib.metadata.requires("jax") or [] if line.startswith("libtpu"))
    return next(named, "libtpu").partition(";")[0].strip()


def _check_libtpu(topology: str) -> None:
    """Raise TopologyError if libtpu does not match the installed jax: it would fail on programs with kernels."""
    series, installed = libtpu_series(), importlib.metadata.version("libtpu")
    numbers = series.partition("==")[2].removesuffix("*")
    if not f"{installed}.".startswith(numbers):
        raise TopologyError(
            f"--topology={topology}: libtpu {installed} does not fit jax {jax.__version__}, which needs {series}; "
            f"fix: pip install '{series}'."
        )


def _gpus(topology: str) -> list[Any]:
    name, _, count = topology.partition(":")
    if not re.fullmatch(r"[1-9]\d{0,3}", count):
        raise TopologyError(f"--topology={topology}: give the number of GPUs of one host, as in {name}:8.")
    target = _HOPPER.format(**vars(GPUS[name]))
    try:
        # "processes x hosts x GPUs per host" of one partition; the compiler is part of JAX's CUDA plugin.
        description = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    except (JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TopologyError(
            f"--topology={topology} needs JAX's CUDA compiler, which runs without a GPU; pip install "
            f'"jax[cuda13]=={jax.__version__}" ({str(error).splitlines()[0]}).'
        ) from None
    return list(description.devices)


def compiler_options(device: Any) -> dict[str, Any]:
    """Return the compiler options for a device that may not be present."""
    here = any(device is one for one in jax.devices())
    return {} if here or device.platform != "gpu" else dict(_NO_GPU)


def usable_bytes(device: Any) -> int | None:
    """Return the bytes of a device's memory that programs may use; None if unknown."""
    if device.platform == "tpu" and device.device_kind in USABLE_HBM:
        return int(USABLE_HBM[device.device_kind] * GIB)
    try:
        stats = device.memory_stats()
    except JaxRuntimeError:  # a device that is not present
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_FRACTION))
        size = next((gpu.memory for gpu in GPUS.values() if gpu.kind == device.device_kind), None)
        return None if size is None else int(size * fraction)
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None

"""The devices to compile for: those at hand, or a TPU slice that need not be, from the `libtpu` wheel alone."""

import importlib.util
import os
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

TESTED = ("v5e:4x4", "v5p:2x2x2", "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x1")
"""Topology names that libtpu 0.0.42.1 takes, of those that were tried."""

GIB = 2**30
USABLE_HBM = {
    "TPU v4": 15.25,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.74,
    "TPU v6 lite": 31.25,
    "TPU7x": 94.75,
}
"""Kind of a device -> GiB that a program may use, as the compiler of libtpu 0.0.42.1 says when one is too large.

Published per chip: v4 32 GB, v5e 16 GB, v5p 95 GB, v6e 32 GB, tpu7x 192 GB (docs.cloud.google.com/tpu/docs). A v4 chip,
named so, and a tpu7x chip show as two devices with half each.
"""

_QUIET = {
    # libtpu asks the machine which TPU it is; any well-formed answer will do, none is used by the compiler.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    # Compiling holds no TPU, so several may compile at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class TopologyError(ValueError):
    """A slice that cannot be compiled for; the message says what to change."""


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice such as "v5p:2x2x4", or those at hand for ""; raises TopologyError."""
    if not topology:
        return list(jax.devices())
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology={topology} needs the TPU compiler, which is no part of jax; pip install libtpu==0.0.42.1. "
            "Without --topology the devices at hand are compiled for."
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise TopologyError(
            f"--topology={topology}: libtpu knows no such slice ({said}); name one as kind:chips, such as "
            f"{', '.join(TESTED)}."
        ) from None


def usable_bytes(device: Any) -> int | None:
    """Bytes of memory of a device that programs may use; None where nobody says."""
    if device.platform == "tpu" and device.device_kind in USABLE_HBM:
        return int(USABLE_HBM[device.device_kind] * GIB)
    try:
        found = device.memory_stats()
    except JaxRuntimeError:  # a device of a slice that is not here
        return None
    return int(found["bytes_limit"]) if found and "bytes_limit" in found else None

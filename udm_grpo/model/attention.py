"""Choose the attention kernel of a run: what model.attention=auto means on its devices, and what they cannot run."""

from dataclasses import dataclass
from typing import Any

from udm_grpo.config import ConfigError, ModelConfig

MIN_CAPABILITY = (8, 0)
"""Minimum compute capability for cuDNN's fused attention: Ampere (A100, RTX 30) and later."""


@dataclass(frozen=True)
class Attention:
    """A kernel and the reason for choosing it."""

    name: str
    """One of ATTENTION_IMPLEMENTATIONS in model/transformer.py."""
    reason: str


def choose(model: ModelConfig, device: Any) -> Attention:
    """Return the kernel for devices of one kind; raises ConfigError if they cannot run the configured one.

    auto: cudnn on NVIDIA GPUs in bfloat16, splash on TPUs, xla elsewhere and if those cannot run.
    """
    obstacles = {
        "cudnn": _cudnn_obstacle(model, device),
        "splash": "" if device.platform == "tpu" else f"splash is for TPUs, and the devices are {device.device_kind}",
        "xla": "",
    }
    name = model.attention
    if name != "auto":
        if obstacles[name]:
            raise ConfigError(f"model.attention is {name}, but {obstacles[name]}; set model.attention=auto.")
        return Attention(name, "as configured")
    best = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
    if best == "xla":
        return Attention(best, f"there is no kernel for {device.device_kind}")
    if obstacles[best]:
        return Attention("xla", f"{best} is not possible: {obstacles[best]}")
    return Attention(best, f"the fastest on {device.device_kind}")


def _cudnn_obstacle(model: ModelConfig, device: Any) -> str:
    # NVIDIA's devices have a compute capability such as 9.0, AMD's a name such as gfx90a.
    parts = str(getattr(device, "compute_capability", "")).split(".")
    if not all(part.isdecimal() for part in parts):
        return f"cuDNN needs NVIDIA GPUs, and the devices are {device.device_kind}"
    if tuple(map(int, parts)) < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        return f"cuDNN's attention needs compute capability {needed}, and {device.device_kind} has {'.'.join(parts)}"
    if model.dtype != "bfloat16":
        return f"cuDNN's attention computes in bfloat16, and model.dtype is {model.dtype}"
    return ""

"""Prepare a command's environment (terminal, JAX settings, devices), and report device errors.

prepare()                     call first: handles terminals that are not UTF-8 and variables that would change results
with device_errors(): ...     wrap all computation: a device error becomes one line
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from rewards_bridge.errors import UserError
from udm_grpo.files.places import is_bucket
from udm_grpo.machine.host_memory import keep_freed_memory, may_have_accelerators
from udm_grpo.machine.idle_gpus import idle_gpus

SETTINGS: dict[str, Any] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_x64": False,
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_transfer_guard": None,
    "jax_transfer_guard_device_to_device": None,
    "jax_transfer_guard_device_to_host": None,
    "jax_transfer_guard_host_to_device": None,
}
"""JAX settings that affect a run's results or whether it works -> the value that a command uses."""
MAX_REASON = 300
"""Characters of a JAX error that are shown."""


class DeviceError(UserError, OSError):
    """A device that cannot be used or that failed; the message is one line that says what to change."""


def prepare() -> None:
    """Let the terminal show any text, and reset JAX settings that would change results, with a warning for each.

    Where there are only CPUs, memory that a program has freed is kept for the next one.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # what a terminal cannot show is shown as \u00e9
    _check_cache()
    if not may_have_accelerators(getattr(jax.config, "jax_platforms", None)):
        keep_freed_memory()
    for name, value in SETTINGS.items():
        current = getattr(jax.config, name, value)
        if current != value and not (value is None and current == "allow"):
            jax.config.update(name, value)
            variable = name.upper()
            print(
                f"warning: {variable}={os.environ.get(variable, current)} is not used: this command computes with "
                f"{'the default' if value is None else value}, so that its results do not depend on the environment.",
                file=sys.stderr,
            )


def _check_cache() -> None:
    """Warn once if the folder of compiled programs is not writable; JAX would warn for each program."""
    place = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not place or is_bucket(place):
        return
    try:
        os.makedirs(place, exist_ok=True)
        usable, reason = os.access(place, os.W_OK | os.X_OK), "this user may not write there"
    except OSError as error:
        jax.config.update("jax_compilation_cache_dir", None)  # there is nothing to read, either
        usable, reason = False, error.strerror or type(error).__name__
    if not usable:
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
        print(
            f"warning: JAX_COMPILATION_CACHE_DIR={place} cannot store compiled programs ({reason}); set it to a "
            "writable folder, or unset it.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Turn a device error, or a failure to find a device, into a DeviceError."""
    try:
        yield
    except JaxRuntimeError as error:
        raise DeviceError(explain(error)) from error
    except RuntimeError as error:
        if "Unable to initialize backend" not in str(error):
            raise
        raise DeviceError(_no_backend(error)) from error


def check_devices() -> None:
    """Make JAX look for its devices, and warn of GPUs that it does not use; raise DeviceError if there are none.

    Must come after the GPUs of scorers have been hidden from JAX and processes have joined.
    """
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # an AssertionError for cuda without its plugin
        raise DeviceError(_no_backend(error)) from error
    if warning := idle_gpus(backend):
        print(f"warning: {warning}", file=sys.stderr)


@contextlib.contextmanager
def on_devices() -> Iterator[None]:
    """Look for devices as `check_devices` does, and turn device errors inside the block into a DeviceError."""
    with device_errors():
        check_devices()
        yield


def explain(error: Exception) -> str:
    """Return one line about a device error: what happened, and what to change."""
    reason = _first_line(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"the device has too little memory ({reason}). Lower rollout.micro_batch, optimizer.micro_batch and "
            "evaluation.batch (or --batch), or use more devices (mesh.fsdp=-1, mesh.data=1); --compile-only reports "
            "what is needed."
        )
    return (
        f"a device failed ({reason}). If it happens again, check the machine's logs (nvidia-smi, dmesg) and try "
        "another device; training resumes from its last checkpoint with --config.checkpoint.resume=latest."
    )


def _no_backend(error: Exception) -> str:
    platforms, visible = os.environ.get("JAX_PLATFORMS", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [f"JAX_PLATFORMS={platforms}"] if platforms else []
    names += [f"CUDA_VISIBLE_DEVICES={visible!r}"] if visible is not None else []
    where = f" (the environment has {', '.join(names)})" if names else ""
    advice = "unset JAX_PLATFORMS or set it to cpu" if platforms else "set JAX_PLATFORMS=cpu to compute without it"
    return (
        f"JAX finds no device that it may use{where}: {_first_line(error) or 'the platform is not installed'}; {advice}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else ""

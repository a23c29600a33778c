"""Settle, at the start of a run, what its configuration leaves to the memory of the devices."""

import contextlib
import sys

import jax
from jax.sharding import Mesh

from udm_grpo.compile_check.fitting import settings_of, settled, with_settings
from udm_grpo.compile_check.measure import Compiler
from udm_grpo.compile_check.programs import sizes_of
from udm_grpo.config import RunConfig
from udm_grpo.files.places import is_bucket
from udm_grpo.lifecycle.output_folder import output_path
from udm_grpo.machine.compiled_programs import kept_programs
from udm_grpo.multihost import hosts
from udm_grpo.released.weights import ReleasedModel


def keep_programs(config: RunConfig, stack: contextlib.ExitStack) -> None:
    """Store compiled programs beside the outputs until `stack` is closed, unless they go into a bucket."""
    if config.compilation_cache and not is_bucket(config.output_dir):
        stack.enter_context(kept_programs(output_path(config).parent))


def settle(stack: contextlib.ExitStack, config: RunConfig, released: ReleasedModel, mesh: Mesh) -> RunConfig:
    """Return the configuration without anything left to the memory of the devices; say what was chosen."""
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index != jax.process_index())
    compiler = Compiler(sizes_of(released, config.model.path), mesh, devices)
    if compiler.limit is not None:
        keep_programs(config, stack)
    chosen, notes = settled(config, compiler)
    chosen = with_settings(config, hosts.from_primary(lambda: settings_of(chosen)))
    if hosts.is_primary():
        print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    return chosen

"""Settle what a configuration leaves to the memory of its devices, by compiling the programs of the run.

Left open are where the compute copies of the weights are (model.compute_weights), what the backward pass recomputes
(model.remat), and the sizes of both micro-batches. Settings that are given stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import MICRO_BATCH
from udm_grpo.compile_check.largest import candidates, largest
from udm_grpo.compile_check.measure import Compiler, Report
from udm_grpo.compile_check.topology import GIB
from udm_grpo.config import RunConfig

NAMES = ("model.compute_weights", "model.remat", "rollout.micro_batch", "optimizer.micro_batch")
"""The settings that can be left open."""
PROGRAMS = ("rollout", "decode", "reference", "update")
ROLLOUT_PROGRAMS = ("rollout", "decode")
"""Programs that process rollout.micro_batch images at a time; the others process optimizer.micro_batch states."""
HARDEST_FIRST = ("update", "rollout", "reference", "decode")
SHARE = 0.95
"""Part of a device's memory that a choice may fill: what is free is in pieces, and not every array fits between."""
PARTS = 4
"""Micro-batches of a rollout whose size is left open, at least: the first images are scored while others are drawn."""


def programs_of(name: str) -> tuple[str, ...]:
    """Return the programs that share a micro-batch with this one."""
    return ROLLOUT_PROGRAMS if name in ROLLOUT_PROGRAMS else ("update", "reference")


def rows_of(config: RunConfig, name: str) -> int:
    """Return the images or states that a program processes in all."""
    images = config.rollout.prompts * config.rollout.group_size
    return images if name in ROLLOUT_PROGRAMS else images * config.grpo.trained_steps // config.grpo.minibatches


def with_micro_batch(config: RunConfig, program: str, size: int) -> RunConfig:
    """Return the configuration with another micro-batch for one program, and for those that share it."""
    if program in ROLLOUT_PROGRAMS:
        return replace(config, rollout=replace(config.rollout, micro_batch=size))
    return replace(config, optimizer=replace(config.optimizer, micro_batch=size))


def settings_of(config: RunConfig) -> list[Any]:
    """Return the settings that can be left open."""
    return [config.model.compute_weights, config.model.remat, config.rollout.micro_batch, config.optimizer.micro_batch]


def with_settings(config: RunConfig, settings: Sequence[Any]) -> RunConfig:
    """Return the configuration with these settings, in the order of `settings_of`."""
    weights, remat, rollout, update = settings
    config = replace(config, model=replace(config.model, compute_weights=weights, remat=remat))
    return _with_sizes(config, {"rollout": rollout, "update": update})


def settled(config: RunConfig, compiler: Compiler) -> tuple[RunConfig, list[str]]:
    """Return the configuration without anything left open, and what was chosen, in words.

    Preferred are whole copies, then the least recomputation, then the largest micro-batches, as far as they fit into
    SHARE of the memory. Where the memory of a device is unknown, as on a CPU, the preferred settings are taken to fit,
    with micro-batches of MICRO_BATCH. If nothing fits, the choice that needs least is returned, with a warning.
    """
    choices = list(_choices(config, compiler))
    open_sizes = [name for name, size in _micro_batches(config).items() if not size]
    if len(choices) == 1 and not open_sizes:
        return choices[0], []
    if compiler.limit is None:
        chosen = _with_sizes(choices[0], dict.fromkeys(open_sizes, MICRO_BATCH))
        kind = compiler.devices[0].device_kind
        quiet = compiler.mesh.size == 1
        return chosen, [] if quiet else [f"{_described(config, chosen)} (the memory of a {kind} device is not known)"]
    measure = partial(_with_room, compiler)
    smallest = meshes.batch_shards(compiler.mesh)
    rejected = []
    for choice in choices:
        chosen = _with_sizes(choice, dict.fromkeys(open_sizes, smallest))
        failing = next((one for one in (measure(chosen, name) for name in HARDEST_FIRST) if not one.fits), None)
        if failing is None:
            break
        rejected.append(f"{_described(config, choice)} does not fit: {_need(failing)}")
    else:
        return chosen, [*rejected, "warning: nothing fits, by the compiler; use more devices or a smaller model"]
    for name in open_sizes:
        chosen = _with_sizes(chosen, {name: _largest(chosen, measure, smallest, name)})
    tight = max((measure(chosen, name) for name in PROGRAMS), key=lambda report: report.together)
    return chosen, [*rejected, f"{_described(config, chosen)}: {_need(tight)}, by the compiler"]


def _choices(config: RunConfig, compiler: Compiler) -> Iterator[RunConfig]:
    """Yield the configurations with everything but the micro-batches settled, the preferred one first."""
    mesh, model = compiler.mesh, config.model
    weights: tuple[str, ...] = (model.compute_weights,)
    if weights == ("auto",) and not meshes.can_replicate(mesh):
        weights = ("sharded",)
    elif weights == ("auto",) and meshes.splits_state(mesh):  # else every device has the whole weights anyway
        weights = ("replicated", "sharded")
    for one in weights:
        for remat in ("none", "dots", "full") if model.remat == "auto" else (model.remat,):
            yield with_settings(config, (one, remat, config.rollout.micro_batch, config.optimizer.micro_batch))


def _micro_batches(config: RunConfig) -> dict[str, int]:
    return {"rollout": config.rollout.micro_batch, "update": config.optimizer.micro_batch}


def _with_sizes(config: RunConfig, sizes: dict[str, int]) -> RunConfig:
    for name, size in sizes.items():
        config = with_micro_batch(config, name, size)
    return config


def _with_room(compiler: Compiler, config: RunConfig, name: str) -> Report:
    """Return the report of a program that may use SHARE of the memory."""
    report = compiler(config, name)
    return replace(report, limit=report.limit and int(SHARE * report.limit))


def _largest(config: RunConfig, measure: Callable[[RunConfig, str], Report], shards: int, name: str) -> int:
    """Return the largest micro-batch at which all programs that share it fit; the smallest is known to."""
    total = rows_of(config, name)
    sizes = candidates(total, shards)
    if name in ROLLOUT_PROGRAMS:
        sizes = [size for size in sizes if size <= max(total // PARTS, sizes[0])]
    for one in programs_of(name):

        def of_size(size: int, one: str = one) -> Report:
            return measure(with_micro_batch(config, one, size), one)

        most = largest(of_size, of_size(sizes[0]), sizes).size or sizes[0]
        sizes = [size for size in sizes if size <= most]
    return sizes[-1]


def _described(config: RunConfig, chosen: RunConfig) -> str:
    """Return the settings that differ from the given ones, in words."""
    triples = zip(NAMES, settings_of(config), settings_of(chosen), strict=True)
    return ", ".join(f"{name}={value}" for name, before, value in triples if value != before)


def _need(report: Report) -> str:
    if report.problem:
        return f"{report.program}: {report.problem}"
    limit = (report.limit or 0) / SHARE / GIB
    return f"{report.program} needs {report.together / GIB:.2f} of {limit:.2f} GiB on each device"

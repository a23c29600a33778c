"""Compile the programs of a run for devices that need not be present: do they fit, and what do they communicate?

    python -m udm_grpo.train --config configs/geneval.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/shapes.py --compile-only

    --topology NAME         a TPU slice as kind:chips (needs the libtpu wheel) or GPUs as h100:8 (needs JAX's CUDA
                            plugin); by default the devices at hand
    --programs A,B          some of rollout, decode, reference, update
    --no-search             do not search for the largest micro-batch that fits
    --report FILE           write the numbers as JSON

No weights are needed: sizes are read from the configuration files in model.path or, for a published model that is not
there, from those in udm_grpo/assets. Prints, for each program, the memory of one device, floating-point operations,
whether it fits, the largest micro-batch that does, and collectives. The exit status is 0 only if everything fits.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import with_hyphens
from udm_grpo import mesh as meshes
from udm_grpo.batch_sizes import micro_batch
from udm_grpo.compile_check.flops import matrix_flops
from udm_grpo.compile_check.hlo_collectives import collectives
from udm_grpo.compile_check.programs import Program, Sizes, device_bytes, mesh_of, programs, read_sizes
from udm_grpo.compile_check.topology import GIB, compiler_options, devices_of, usable_bytes
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.files import places
from udm_grpo.lifecycle.start_notes import start_notes
from udm_grpo.machine.gpu_split import reserved
from udm_grpo.model import transformer

PROGRAMS = ("rollout", "decode", "reference", "update")
ROLLOUT_PROGRAMS = ("rollout", "decode")
"""Programs that process rollout.micro_batch images at a time; the others process optimizer.micro_batch states."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Report:
    """What the compiler reports for one program; bytes are those of one device."""

    program: str
    micro_batch: int
    arguments: int
    temporaries: int
    output: int
    """Without results that reuse the memory of a donated argument."""
    beside: int
    """Held on the device meanwhile but not an argument: optimizer state, the reference model, the tokenizer."""
    limit: int | None
    """Memory that programs may use; None if it is unknown."""
    flops: int
    """Matrix products and convolutions of all devices together."""
    repeated: float | None
    """Operations that all devices execute, divided by those that are needed; above 1, devices repeat the same work.

    Both count loop bodies once; below 1 where the compiler made a loop of one product, to overlap it with a collective.
    """
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kind -> count and bytes in one execution."""
    seconds: float = 0.0
    """Duration of the compilation."""
    problem: str = ""
    """Why compilation failed; empty if it succeeded."""
    too_large: bool = True
    """Whether the size is what makes it fail or not fit; anything else is an error of the compiler."""

    @property
    def together(self) -> int:
        """Bytes that must be in memory at the same time."""
        return self.arguments + self.temporaries + self.output + self.beside

    @property
    def fits(self) -> bool:
        """Whether it compiled and a device has enough memory."""
        return not self.problem and (self.limit is None or self.together <= self.limit)


def compile_program(program: Program, devices: list[Any]) -> Report:
    """Compile one program; one that is too large to compile gives a report as well."""
    traced, began, limit = program.trace(), time.monotonic(), usable_bytes(devices[0])
    flops = matrix_flops(traced.jaxpr.jaxpr)
    present = device_bytes(program.present)
    report = Report(program.name, program.micro_batch, 0, 0, 0, present, limit, flops, None)
    try:
        compiled = traced.lower().compile(compiler_options=compiler_options(devices[0]))
    except JaxRuntimeError as error:
        return replace(report, seconds=time.monotonic() - began, **_too_large(str(error)))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    once = matrix_flops(traced.jaxpr.jaxpr, loops=False)
    return replace(
        report,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        beside=max(0, present - memory.argument_size_in_bytes),
        repeated=cost["flops"] * len(devices) / once if once and "flops" in cost else None,
        collectives={kind: asdict(total) for kind, total in collectives(compiled.as_text()).items()},
        seconds=time.monotonic() - began,
    )


def _too_large(message: str) -> dict[str, Any]:
    """Return the fields of a Report for a compiler error: the memory that would be needed, or another reason."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds", message
    )
    chip = re.search(r"Scoped allocation with size ([\d.]+[KMG]) and limit ([\d.]+[KMG]) exceeded scoped vmem", message)
    if chip:
        return {"problem": f"one operation wants {chip[1]} of on-chip memory (VMEM), and the compiler has {chip[2]}"}
    lines = message.splitlines()
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if not used:
        return {"problem": first, "too_large": "RESOURCE_EXHAUSTED" in message}
    needed = int(float(used.group(1)) * _UNITS[used.group(2)])
    return {"temporaries": needed, "problem": f"too large for the compiler: {first}"}


def candidates(total: int, shards: int) -> list[int]:
    """Return the micro-batches to try: those without padding, or, if there are none, all that `micro_batch` gives."""
    even = [size for size in range(shards, total + 1, shards) if total % size == 0]
    return even or sorted({micro_batch(total, size, shards) for size in range(1, total + 1)})


@dataclass(frozen=True)
class Search:
    """The largest micro-batch that fits, and why a larger one does not."""

    size: int | None
    """None if even the smallest does not fit, or if the memory of a device is unknown."""
    beyond: str = ""
    """Why the next larger one does not fit; empty if there is none."""


def largest(measure: Callable[[int], Report], first: Report, sizes: Sequence[int]) -> Search:
    """Return the largest of `sizes` (ascending) at which a program fits, with few compilations.

    Memory grows about linearly: two sizes predict where the limit is, and the prediction is checked by compiling it.
    """
    if first.limit is None:
        return Search(None)
    reports = {first.micro_batch: first}
    while True:
        fitting = [size for size in sizes if size in reports and reports[size].fits]
        failing = [size for size in sizes if size in reports and not reports[size].fits]
        low, high = max(fitting, default=0), min(failing, default=sizes[-1] + 1)
        between = [size for size in sizes if low < size < high]
        known = [report for report in reports.values() if report.arguments]
        expected = {size: _expected(known, size) for size in between} if len(known) > 1 else {}
        guess = [size for size in expected if expected[size] <= first.limit]
        if len(known) < 2:
            guess = between[:1] if low else between[-1:]
        if not guess:
            beyond = next((size for size in sizes if size > low), None)
            return Search(low or None, "" if beyond is None else _beyond(beyond, reports.get(beyond), expected))
        size = guess[len(guess) // 2] if failing and low else guess[-1]  # bisect once the line has been wrong
        reports[size] = measure(size)


def _expected(known: list[Report], size: int) -> int:
    """Return the bytes of a device on the straight line through the two largest of `known`."""
    one, other = sorted(known, key=lambda report: report.micro_batch)[-2:]
    slope = (other.together - one.together) / (other.micro_batch - one.micro_batch)
    return int(other.together + slope * (size - other.micro_batch))


def _beyond(size: int, report: Report | None, expected: dict[int, int]) -> str:
    """Return why a size does not fit: the compiler's error, or the memory it would need."""
    if report is None:
        return f"{size} would need about {expected[size] / GIB:.2f} GiB a device"
    return f"{size}: {report.problem}" if report.problem else f"{size} need {report.together / GIB:.2f} GiB a device"


def with_micro_batch(config: RunConfig, program: str, size: int) -> RunConfig:
    """Return the configuration with another micro-batch for one program."""
    if program in ROLLOUT_PROGRAMS:
        return replace(config, rollout=replace(config.rollout, micro_batch=size))
    return replace(config, optimizer=replace(config.optimizer, micro_batch=size))


def report_all(
    config: RunConfig, sizes: Sizes, devices: list[Any], selected: Sequence[str], search: bool
) -> list[tuple[Report, Search | None]]:
    """Return (report, search for the largest micro-batch) of each selected program; print each once it is compiled."""
    mesh = mesh_of(config, sizes, devices)
    whole = transformer.abstract(sizes.transformer)
    print("\n".join(start_notes(config, sizes.transformer, whole, mesh)), flush=True)
    images = config.rollout.prompts * config.rollout.group_size
    results = []
    for name, program in programs(config, sizes, mesh).items():
        if name not in selected:
            continue
        states = images * config.grpo.trained_steps // config.grpo.minibatches
        total = images if name in ROLLOUT_PROGRAMS else states
        report = compile_program(program, devices)

        def measure(size: int, name: str = name) -> Report:
            return compile_program(programs(with_micro_batch(config, name, size), sizes, mesh)[name], devices)

        most = largest(measure, report, candidates(total, meshes.batch_shards(mesh))) if search else None
        print("\n".join(describe(report, most)), flush=True)
        results.append((report, most))
    return results


def describe(report: Report, most: Search | None) -> list[str]:
    """Return the lines to print for one program."""
    gib = {name: getattr(report, name) / GIB for name in ("arguments", "temporaries", "output", "beside", "together")}
    limit = "no limit known" if report.limit is None else f"of {report.limit / GIB:.2f} GiB"
    verdict = "fits" if report.fits else "DOES NOT FIT" if report.too_large else "DOES NOT COMPILE"
    lines = [
        f"{report.program}, {report.micro_batch} at a time: {verdict}, {gib['together']:.2f} {limit} a device",
        "  " + ", ".join(f"{name} {gib[name]:.2f}" for name in ("arguments", "temporaries", "output", "beside")),
    ]
    if report.problem:
        return [*lines, f"  {report.problem}"]
    if most and report.limit is not None:
        more = f" ({most.beyond})" if most.beyond else ""
        lines.append(f"  largest micro-batch that fits: {most.size or 'none'}{more}")
    work = "" if report.repeated is None else f", work done {report.repeated:.2f} times"
    lines.append(f"  {report.flops / 1e12:.4g} TFLOP on all devices{work}; compiled in {report.seconds:.0f} s")
    moved = (f"{kind} {one['count']} x, {one['bytes'] / GIB:.3f} GiB" for kind, one in report.collectives.items())
    return [*lines, f"  a device sends or receives: {'; '.join(moved) or 'nothing'}"]


@dataclass(frozen=True)
class Options:
    """The flags that are not fields of the configuration."""

    rest: list[str]
    """The remaining words of the command line."""
    topology: str
    """Empty for the devices at hand."""
    programs: tuple[str, ...]
    report: str
    """File for the numbers; empty for none."""
    search: bool
    """Whether to search for the largest micro-batch."""


def options(words: Sequence[str]) -> Options:
    """Read the flags. Raises ConfigError for a flag without a value and for unknown programs."""
    rest: list[str] = []
    values = {"--topology": "", "--programs": ",".join(PROGRAMS), "--report": ""}
    pending = iter(words)
    for word in pending:
        flag, equals, value = word.partition("=")
        if flag in values:
            values[flag] = value if equals else next(pending, "")
            if not values[flag] or values[flag].startswith("--"):
                raise ConfigError(f"{flag} has no value; write {flag}=value.")
        elif word not in ("--compile-only", "--no-search"):
            rest.append(word)
    selected = tuple(values["--programs"].split(","))
    unknown = [name for name in selected if name not in PROGRAMS]
    if unknown:
        raise ConfigError(f"--programs: unknown {', '.join(unknown)}; choose from {','.join(PROGRAMS)}.")
    return Options(rest, values["--topology"], selected, values["--report"], "--no-search" not in words)


def main(argv: Sequence[str]) -> int:
    """Run the command line of train.py with --compile-only in it; return the exit status."""
    try:
        flags = options(with_hyphens(argv))
        config = parse(flags.rest)
        validate(config)
        for name, place in (("model.path", config.model.path), ("--report", flags.report)):
            if problem := places.problem(name, place):
                raise ConfigError(problem)
        if flags.topology:
            jax.config.update("jax_platforms", "cpu")  # leaves a local TPU free for other processes
        with contextlib.nullcontext() if flags.topology else reserved(config.rewards):
            devices = devices_of(flags.topology)
        sizes = read_sizes(config.model.path, config.model.text_length)
        kind = devices[0].device_kind
        print(f"{flags.topology or 'the devices at hand'}: {len(devices)} x {kind}, mesh {asdict(config.mesh)}")
        print(f"sizes of {sizes.folder}, {config.model.height} x {config.model.width} pixels", flush=True)
        results = report_all(config, sizes, devices, flags.programs, flags.search)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    if flags.report:
        rows = [
            asdict(report)
            | {"together": report.together, "fits": report.fits}
            | {"largest": most and most.size, "beyond": most.beyond if most else ""}
            for report, most in results
        ]
        record = {"topology": flags.topology, "devices": len(devices), "kind": kind, "programs": rows}
        Path(flags.report).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(report.fits for report, _ in results) else 1

"""Compile the programs of a run without running them, for devices that need not be here: does it fit, what moves?

    python -m udm_grpo.train --config configs/geneval.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/shapes.py --compile-only

    --topology NAME         a TPU slice as kind:chips, by the libtpu wheel, or GPUs as h100:8, by JAX's CUDA plugin;
                            without it, the devices at hand
    --programs A,B          some of rollout, decode, reference, update
    --no-search             do not look for the largest micro-batch that fits
    --report FILE           the numbers as JSON

Needs no weights: sizes are read from the configuration files in model.path, or, for a published checkpoint that is not
there, from those in udm_grpo/assets. Prints, for each program, the memory of one device, floating-point operations,
whether it fits, the largest micro-batch that does, and collectives; ends with status 0 only if everything fits.
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
"""What works in rollout.micro_batch images; the others work in optimizer.micro_batch states."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Report:
    """What the compiler says of one program; bytes are of one device."""

    program: str
    micro_batch: int
    arguments: int
    temporaries: int
    output: int
    """Without what takes the place of a donated argument."""
    beside: int
    """Held on the device meanwhile, without being an argument: optimizer state, the reference, the tokenizer."""
    limit: int | None
    """What programs may use; None where nobody says."""
    flops: int
    """Of all devices together, matrix products and convolutions."""
    repeated: float | None
    """Operations that the devices do together over those that are needed: above 1, they do the same work.

    Both count loop bodies once; below 1 where the compiler made a loop of one product, to overlap it with a collective.
    """
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kind -> count and bytes of one execution."""
    seconds: float = 0.0
    """That compilation took."""
    problem: str = ""
    """Why there is no program."""
    too_large: bool = True
    """Whether that, or the memory needed, is a question of size; anything else is an error of the compiler."""

    @property
    def together(self) -> int:
        """Bytes that have to be there at once."""
        return self.arguments + self.temporaries + self.output + self.beside

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return not self.problem and (self.limit is None or self.together <= self.limit)


def compile_program(program: Program, devices: list[Any]) -> Report:
    """Compile one program; what does not compile because it is too large is a report too."""
    traced, began, limit = program.trace(), time.monotonic(), usable_bytes(devices[0])
    flops = matrix_flops(traced.jaxpr.jaxpr)
    present = device_bytes(program.present)
    made = Report(program.name, program.micro_batch, 0, 0, 0, present, limit, flops, None)
    try:
        compiled = traced.lower().compile(compiler_options=compiler_options(devices[0]))
    except JaxRuntimeError as error:
        return replace(made, seconds=time.monotonic() - began, **_too_large(str(error)))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    once = matrix_flops(traced.jaxpr.jaxpr, loops=False)
    return replace(
        made,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        beside=max(0, present - memory.argument_size_in_bytes),
        repeated=cost["flops"] * len(devices) / once if once and "flops" in cost else None,
        collectives={kind: asdict(found) for kind, found in collectives(compiled.as_text()).items()},
        seconds=time.monotonic() - began,
    )


def _too_large(message: str) -> dict[str, Any]:
    """Return what the compiler's error says: the memory that would be needed, or another reason."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds", message
    )
    chip = re.search(r"Scoped allocation with size ([\d.]+[KMG]) and limit ([\d.]+[KMG]) exceeded scoped vmem", message)
    if chip:
        return {"problem": f"one operation wants {chip[1]} of on-chip memory (VMEM), and the compiler has {chip[2]}"}
    lines = message.splitlines()
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if not found:
        return {"problem": first, "too_large": "RESOURCE_EXHAUSTED" in message}
    needed = int(float(found.group(1)) * _UNITS[found.group(2)])
    return {"temporaries": needed, "problem": f"too large for the compiler: {first}"}


def candidates(total: int, shards: int) -> list[int]:
    """Micro-batches to try: those that need no padding, or, where none does, all that `micro_batch` gives."""
    even = [size for size in range(shards, total + 1, shards) if total % size == 0]
    return even or sorted({micro_batch(total, size, shards) for size in range(1, total + 1)})


@dataclass(frozen=True)
class Search:
    """The largest micro-batch that fits, and what is in the way of a larger one."""

    size: int | None
    """None: not even the smallest, or nobody says what a device has."""
    beyond: str = ""
    """Why the next larger one does not fit; empty where there is none."""


def largest(measure: Callable[[int], Report], first: Report, sizes: Sequence[int]) -> Search:
    """Return the largest of `sizes` (rising) at which a program fits, by few compilations.

    Memory grows about linearly: two sizes say where the limit will be, and what they say is compiled as well.
    """
    if first.limit is None:
        return Search(None)
    found = {first.micro_batch: first}
    while True:
        fitting = [size for size in sizes if size in found and found[size].fits]
        failing = [size for size in sizes if size in found and not found[size].fits]
        low, high = max(fitting, default=0), min(failing, default=sizes[-1] + 1)
        between = [size for size in sizes if low < size < high]
        known = [report for report in found.values() if report.arguments]
        expected = {size: _expected(known, size) for size in between} if len(known) > 1 else {}
        guess = [size for size in expected if expected[size] <= first.limit]
        if len(known) < 2:
            guess = between[:1] if low else between[-1:]
        if not guess:
            beyond = next((size for size in sizes if size > low), None)
            return Search(low or None, "" if beyond is None else _beyond(beyond, found.get(beyond), expected))
        size = guess[len(guess) // 2] if failing and low else guess[-1]  # halve once the line has been wrong
        found[size] = measure(size)


def _expected(known: list[Report], size: int) -> int:
    """Bytes of a device by the straight line through the last two of `known`."""
    one, other = sorted(known, key=lambda report: report.micro_batch)[-2:]
    slope = (other.together - one.together) / (other.micro_batch - one.micro_batch)
    return int(other.together + slope * (size - other.micro_batch))


def _beyond(size: int, report: Report | None, expected: dict[int, int]) -> str:
    """Why a size does not fit: what the compiler said, or what it would need."""
    if report is None:
        return f"{size} would need about {expected[size] / GIB:.2f} GiB a device"
    return f"{size}: {report.problem}" if report.problem else f"{size} need {report.together / GIB:.2f} GiB a device"


def with_micro_batch(config: RunConfig, program: str, size: int) -> RunConfig:
    """Return the configuration with another micro-batch for one program."""
    if program in ROLLOUT_PROGRAMS:
        return replace(config, rollout=replace(config.rollout, micro_batch=size))
    return replace(config, optimizer=replace(config.optimizer, micro_batch=size))


def report_all(
    config: RunConfig, sizes: Sizes, devices: list[Any], wanted: Sequence[str], search: bool
) -> list[tuple[Report, Search | None]]:
    """(report, search for the largest micro-batch) of the wanted programs, printed as they come."""
    mesh = mesh_of(config, sizes, devices)
    whole = transformer.abstract(sizes.transformer)
    print("\n".join(start_notes(config, sizes.transformer, whole, mesh)), flush=True)
    images = config.rollout.prompts * config.rollout.group_size
    found = []
    for name, program in programs(config, sizes, mesh).items():
        if name not in wanted:
            continue
        states = images * config.grpo.trained_steps // config.grpo.minibatches
        total = images if name in ROLLOUT_PROGRAMS else states
        report = compile_program(program, devices)

        def measure(size: int, name: str = name) -> Report:
            return compile_program(programs(with_micro_batch(config, name, size), sizes, mesh)[name], devices)

        most = largest(measure, report, candidates(total, meshes.batch_shards(mesh))) if search else None
        print("\n".join(describe(report, most)), flush=True)
        found.append((report, most))
    return found


def describe(report: Report, most: Search | None) -> list[str]:
    """Return a program's lines for people."""
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
    """The other words of the command line."""
    topology: str
    """Empty: the devices at hand."""
    programs: tuple[str, ...]
    report: str
    """File for the numbers, or empty."""
    search: bool
    """Whether to look for the largest micro-batch."""


def options(words: Sequence[str]) -> Options:
    """Read the flags; raises ConfigError for one without a value and for unknown programs."""
    rest: list[str] = []
    given = {"--topology": "", "--programs": ",".join(PROGRAMS), "--report": ""}
    pending = iter(words)
    for word in pending:
        flag, equals, value = word.partition("=")
        if flag in given:
            given[flag] = value if equals else next(pending, "")
            if not given[flag] or given[flag].startswith("--"):
                raise ConfigError(f"{flag} has no value; write {flag}=value.")
        elif word not in ("--compile-only", "--no-search"):
            rest.append(word)
    wanted = tuple(given["--programs"].split(","))
    unknown = [name for name in wanted if name not in PROGRAMS]
    if unknown:
        raise ConfigError(f"--programs: there is no {', '.join(unknown)}; name some of {','.join(PROGRAMS)}.")
    return Options(rest, given["--topology"], wanted, given["--report"], "--no-search" not in words)


def main(argv: Sequence[str]) -> int:
    """Run the command line of train.py with --compile-only in it; return the exit status."""
    try:
        given = options(with_hyphens(argv))
        config = parse(given.rest)
        validate(config)
        for name, place in (("model.path", config.model.path), ("--report", given.report)):
            if problem := places.problem(name, place):
                raise ConfigError(problem)
        if given.topology:
            jax.config.update("jax_platforms", "cpu")  # a TPU that is here stays free for others
        with contextlib.nullcontext() if given.topology else reserved(config.rewards):
            devices = devices_of(given.topology)
        sizes = read_sizes(config.model.path, config.model.text_length)
        kind = devices[0].device_kind
        print(f"{given.topology or 'the devices at hand'}: {len(devices)} x {kind}, mesh {asdict(config.mesh)}")
        print(f"sizes of {sizes.folder}, {config.model.height} x {config.model.width} pixels", flush=True)
        found = report_all(config, sizes, devices, given.programs, given.search)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    if given.report:
        made = [
            asdict(report)
            | {"together": report.together, "fits": report.fits}
            | {"largest": most and most.size, "beyond": most.beyond if most else ""}
            for report, most in found
        ]
        record = {"topology": given.topology, "devices": len(devices), "kind": kind, "programs": made}
        Path(given.report).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(report.fits for report, _ in found) else 1

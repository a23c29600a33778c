"""Compile the programs of a run for devices that need not be present: do they fit, and what do they communicate?

    python -m udm_grpo.train --config configs/geneval.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/shapes.py --compile-only

    --topology NAME         a TPU slice as kind:chips (needs the libtpu wheel) or GPUs as h100:8 or h200:1 (needs
                            JAX's CUDA plugin); by default the devices at hand
    --programs A,B          some of rollout, decode, reference, update
    --no-search             do not search for the largest micro-batch that fits
    --report FILE           write the numbers as JSON

No weights are needed: sizes are read from the configuration files in model.path or, for a published model that is not
there, from those in udm_grpo/assets. Prints, for each program, the memory of one device, floating-point operations,
whether it fits, the largest micro-batch that does, and collectives. The exit status is 0 only if everything fits.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.flags import with_hyphens
from udm_grpo import mesh as meshes
from udm_grpo.compile_check.fitting import PROGRAMS, rows_of, settled, with_micro_batch
from udm_grpo.compile_check.largest import Search, candidates, largest
from udm_grpo.compile_check.measure import Compiler, Report
from udm_grpo.compile_check.programs import mesh_of, read_sizes
from udm_grpo.compile_check.topology import GIB, devices_of
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.files import places
from udm_grpo.lifecycle.start_notes import start_notes
from udm_grpo.machine.gpu_split import reserved
from udm_grpo.model import transformer


def report_all(
    config: RunConfig, compiler: Compiler, selected: Sequence[str], search: bool
) -> list[tuple[Report, Search | None]]:
    """Return (report, search for the largest micro-batch) of each selected program; print each once it is compiled."""
    whole = transformer.abstract(compiler.sizes.transformer)
    print("\n".join(start_notes(config, compiler.sizes.transformer, whole, compiler.mesh)), flush=True)
    results = []
    for name in (name for name in PROGRAMS if name in selected):
        report = compiler(config, name)

        def measure(size: int, name: str = name) -> Report:
            return compiler(with_micro_batch(config, name, size), name)

        possible = candidates(rows_of(config, name), meshes.batch_shards(compiler.mesh))
        most = largest(measure, report, possible) if search else None
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
        compiler = Compiler(sizes, mesh_of(config, sizes, devices), devices)
        print(f"{flags.topology or 'the devices at hand'}: {len(devices)} x {kind}, mesh {asdict(config.mesh)}")
        print(f"sizes of {sizes.folder}, {config.model.height} x {config.model.width} pixels", flush=True)
        config, notes = settled(config, compiler)
        print("".join(f"{note}\n" for note in notes), end="", flush=True)
        results = report_all(config, compiler, flags.programs, flags.search)
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

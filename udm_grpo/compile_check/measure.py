"""Compile one program and report what the compiler says of it: memory, operations, collectives."""

import re
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from udm_grpo.compile_check.flops import matrix_flops
from udm_grpo.compile_check.hlo_collectives import collectives
from udm_grpo.compile_check.programs import Program, Sizes, device_bytes, programs
from udm_grpo.compile_check.topology import compiler_options, usable_bytes
from udm_grpo.config import RunConfig

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
        return replace(report, seconds=time.monotonic() - began, **too_large(str(error)))
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


def too_large(message: str) -> dict[str, Any]:
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


@dataclass
class Compiler:
    """Compiles the programs of a run for a mesh, each of them once for each configuration."""

    sizes: Sizes
    mesh: Mesh
    devices: list[Any]
    """Those of the mesh; the first decides what memory a device has."""
    reports: dict[tuple[str, str], Report] = field(default_factory=dict)

    def __call__(self, config: RunConfig, name: str) -> Report:
        """Return the report of a program."""
        key = (repr(config), name)
        if key not in self.reports:
            self.reports[key] = compile_program(programs(config, self.sizes, self.mesh)[name], self.devices)
        return self.reports[key]

    @property
    def limit(self) -> int | None:
        """Bytes that programs may use on a device; None if unknown."""
        return usable_bytes(self.devices[0])

"""What devices say to each other in a compiled program, read off its text: collectives by kind, with their bytes."""

import math
import re
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]+[a-z0-9]*|pred)\[([0-9,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclass
class Collective:
    """All collectives of one kind in one execution of a program."""

    count: int = 0
    """How often one runs; one in a loop counts once for each turn."""
    bytes: int = 0
    """Bytes on one device: of the results, and of the operands of a reduce-scatter."""


@dataclass
class _Computation:
    types: dict[str, str] = field(default_factory=dict)
    """Instruction -> its type."""
    own: list[tuple[str, int]] = field(default_factory=list)
    """(kind, bytes) of the collectives in it."""
    calls: list[tuple[str, int]] = field(default_factory=list)
    """(computation, times) that it calls."""
    constants: dict[str, int] = field(default_factory=dict)
    """Instruction -> its value, for whole numbers."""
    bound: int | None = None
    """N of a loop's condition i < N."""


def collectives(text: str) -> dict[str, Collective]:
    """Kind -> Collective of one execution, from `compiled.as_text()`; kinds that do not occur are left out.

    A loop's body counts as often as the loop turns, which is read off the compiler's note or off a condition i < N;
    where it says neither, once.
    """
    entry, computations = _read(text)
    found: dict[str, Collective] = {}

    def add(name: str, times: int) -> None:
        for kind, size in computations[name].own:
            total = found.setdefault(kind, Collective())
            total.count += times
            total.bytes += times * size
        for callee, turns in computations[name].calls:
            if callee in computations:
                add(callee, times * turns)

    if entry:
        add(entry, 1)
    return found


def type_bytes(text: str) -> int:
    """Bytes of an array type such as bf16[32,1345]{1,0}, or of all arrays in a tuple type."""
    return sum(
        math.ceil(_bits(kind) * math.prod(int(size) for size in shape.split(",") if size) / 8)
        for kind, shape in _ARRAY.findall(text)
    )


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    found = re.search(r"\d+", kind)
    return int(found.group()) if found else 0


def _read(text: str) -> tuple[str, dict[str, _Computation]]:
    entry, computations, waiting = "", {}, []
    current = _Computation()
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head.group(2), _Computation())
            entry = head.group(2) if head.group(1) else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            name, kind, operation, rest = instruction.groups()
            current.types[name] = kind
            _note(current, name, kind, operation, rest)
            if operation == "while":
                waiting.append((current, rest))
    for computation, rest in waiting:  # a condition may stand below its loop
        computation.calls.append((_called(rest, "body")[0], _turns(rest, computations)))
    return entry, computations


def _note(computation: _Computation, name: str, kind: str, operation: str, rest: str) -> None:
    plain = operation.removesuffix("-start")
    if plain in KINDS:
        computation.own.append((plain, _collective_bytes(computation, kind, operation, rest)))
    elif operation == "constant" and rest.split(")")[0].isdigit():
        computation.constants[name] = int(rest.split(")")[0])
    elif operation == "compare" and "direction=LT" in rest:
        limit = _operands(rest)[-1]
        computation.bound = computation.constants.get(limit)
    elif operation in ("fusion", "call", "async-start", "conditional"):
        for attribute in ("calls", "to_apply", "branch_computations", "true_computation", "false_computation"):
            computation.calls += [(callee, 1) for callee in _called(rest, attribute)]


def _collective_bytes(computation: _Computation, kind: str, operation: str, rest: str) -> int:
    given = sum(type_bytes(computation.types.get(name, "")) for name in _operands(rest))
    if operation.startswith("reduce-scatter"):
        return given
    if operation in ("all-gather-start", "collective-permute-start"):  # a tuple of operands and results
        return type_bytes(kind) - given
    return type_bytes(kind)


def _operands(rest: str) -> list[str]:
    """Names of the operands, from the text behind an operation's opening bracket; types in front of them or not."""
    depth, end = 1, 0
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", rest[: end - 1])


def _called(rest: str, attribute: str) -> list[str]:
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"%?([\w.\-]+)", found.group(1)) if found else []


def _turns(rest: str, computations: dict[str, _Computation]) -> int:
    known = _TRIPS.search(rest)
    if known:
        return int(known.group(1))
    condition = computations.get(_called(rest, "condition")[0])
    return condition.bound if condition and condition.bound is not None else 1

"""Count the collectives of a compiled program by kind, with their bytes, from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterable
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
    """Number of executions; a collective in a loop counts once for each iteration."""
    bytes: int = 0
    """Bytes on one device: of the results, and of the operands of a reduce-scatter."""


@dataclass(frozen=True)
class _Operation:
    kind: str
    bytes: int
    channel: str
    """Shared by the pieces of one collective that is spread over other work; empty if there is none."""


@dataclass
class _Computation:
    types: dict[str, str] = field(default_factory=dict)
    """Instruction -> its type."""
    own: list[_Operation] = field(default_factory=list)
    """The collectives in this computation."""
    calls: list[tuple[str, int]] = field(default_factory=list)
    """(computation, number of times) that this one calls."""
    constants: dict[str, int] = field(default_factory=dict)
    """Instruction -> its value, for integer constants."""
    elements: dict[str, int] = field(default_factory=dict)
    """Instruction -> index of the tuple element that it takes."""
    sums: dict[str, list[str]] = field(default_factory=dict)
    """Instruction -> names of what it adds."""
    less: list[str] = field(default_factory=list)
    """[i, N] of the comparison i < N in this computation."""
    last: list[str] = field(default_factory=list)
    """Operands of the last instruction: the next state of a loop body."""


def collectives(text: str) -> dict[str, Collective]:
    """Return kind -> Collective of one execution, from `compiled.as_text()`; kinds that do not occur are left out.

    A loop body counts once for each iteration. Their number is taken from the compiler's annotation or from the loop
    counter (i < N, and what the body adds to i); if neither is known, the body counts once. A collective whose pieces
    the compiler spread over other work counts once, not once for each piece: the pieces, in computations of their own,
    have its channel. All collectives of a shard_map share one channel; those are told apart within a computation.
    """
    entry, computations = _read(text)
    shared = _shared_channels(computations.values())
    pieces: dict[str, tuple[int, _Operation]] = {}

    def visit(name: str, times: int) -> None:
        seen: Counter[str] = Counter()
        for number, operation in enumerate(computations[name].own):
            key = operation.channel or f"{name} {number} {len(pieces)}"
            if key in shared:
                alike = f"{key} {operation.kind} {operation.bytes}"
                key = f"{alike} {seen[alike]}"
                seen[alike] += 1
            known = pieces.get(key)
            pieces[key] = (times if known is None else min(times, known[0]), operation)
        for callee, turns in computations[name].calls:
            if callee in computations:
                visit(callee, times * turns)

    if entry:
        visit(entry, 1)
    totals: dict[str, Collective] = {}
    for times, operation in pieces.values():
        total = totals.setdefault(operation.kind, Collective())
        total.count += times
        total.bytes += times * operation.bytes
    return totals


def _shared_channels(computations: Iterable[_Computation]) -> set[str]:
    """Return the channels that several collectives of one computation have."""
    counts = (Counter(one.channel for one in computation.own if one.channel) for computation in computations)
    return {channel for count in counts for channel, times in count.items() if times > 1}


def type_bytes(text: str) -> int:
    """Return the bytes of an array type such as bf16[32,1345]{1,0}, or of all arrays in a tuple type."""
    return sum(
        math.ceil(_bits(kind) * math.prod(int(size) for size in shape.split(",") if size) / 8)
        for kind, shape in _ARRAY.findall(text)
    )


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else 0


def _read(text: str) -> tuple[str, dict[str, _Computation]]:
    entry = ""
    computations: dict[str, _Computation] = {}
    waiting: list[tuple[_Computation, str]] = []
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
    for computation, rest in waiting:  # the parts of a loop may follow it
        computation.calls.append((_called(rest, "body")[0], _turns(rest, computations)))
    return entry, computations


def _note(computation: _Computation, name: str, kind: str, operation: str, rest: str) -> None:
    plain = operation.removesuffix("-start")
    computation.last = _operands(rest)
    if plain in KINDS:
        channel = re.search(r"channel_id=(\d+)", rest)
        size = _collective_bytes(computation, kind, operation, rest)
        computation.own.append(_Operation(plain, size, channel.group(1) if channel else ""))
    elif operation == "get-tuple-element":
        computation.elements[name] = int(rest.split("index=")[1].split(",")[0])
    elif operation == "add":
        computation.sums[name] = _operands(rest)
    elif operation == "constant" and rest.split(")")[0].isdigit():
        computation.constants[name] = int(rest.split(")")[0])
    elif operation == "compare" and "direction=LT" in rest:
        computation.less = _operands(rest)
    elif operation in ("fusion", "call", "call-start", "async-start", "conditional"):
        for attribute in ("calls", "to_apply", "branch_computations", "true_computation", "false_computation"):
            computation.calls += [(callee, 1) for callee in _called(rest, attribute)]


def _collective_bytes(computation: _Computation, kind: str, operation: str, rest: str) -> int:
    operand_bytes = sum(type_bytes(computation.types.get(name, "")) for name in _operands(rest))
    if operation.startswith("reduce-scatter"):
        return operand_bytes
    if operation in ("all-gather-start", "collective-permute-start"):  # a tuple of operands and results
        return type_bytes(kind) - operand_bytes
    return type_bytes(kind)


def _operands(rest: str) -> list[str]:
    """Return the names of the operands from the text after an operation's opening bracket, which may have types."""
    depth, end = 1, 0
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", rest[: end - 1])


def _called(rest: str, attribute: str) -> list[str]:
    match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", rest)
    return re.findall(r"%?([\w.\-]+)", match.group(1)) if match else []


def _turns(rest: str, computations: dict[str, _Computation]) -> int:
    known = _TRIPS.search(rest)
    if known:
        return int(known.group(1))
    condition, body = (computations.get(_called(rest, part)[0]) for part in ("condition", "body"))
    if not condition or not body or len(condition.less) != 2:
        return 1
    counter, limit = condition.less
    place = condition.elements.get(counter, len(body.last))
    added = body.sums.get(body.last[place], []) if place < len(body.last) else []
    steps = [body.constants[name] for name in added if body.constants.get(name)]
    return -(-condition.constants.get(limit, 1) // (steps[0] if steps else 1))

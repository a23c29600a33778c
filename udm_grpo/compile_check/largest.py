"""Find the largest micro-batch at which a program fits into the memory of a device, with few compilations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from udm_grpo.batch_sizes import micro_batch
from udm_grpo.compile_check.measure import Report
from udm_grpo.compile_check.topology import GIB


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

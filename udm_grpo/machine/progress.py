"""Progress bars of the commands: only on a terminal, and only for work that takes longer than a second."""

from typing import TextIO

from tqdm import tqdm

SHOWN_AFTER_S = 1.0


def progress_bar(total: int, what: str, unit: str, done: int = 0, stream: TextIO | None = None) -> tqdm:
    """Return a bar for `total` units, `done` of them already finished; a context manager with `update(count)`.

    what: the work, as in "writing"; stream: default standard error.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024,
        delay=SHOWN_AFTER_S,
        file=stream,
        disable=None,
        dynamic_ncols=True,
    )

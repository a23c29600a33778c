"""Checks of an iteration's numbers: stop at values that are not finite, warn where nothing can be learned."""

import math
from collections.abc import Mapping

from rewards_bridge.errors import UserError

WARN_AFTER = (3, 30, 300, 3000)
"""Iterations without an update, in a row, after which a warning is given."""


class DivergedError(UserError, RuntimeError):
    """A number of the training is NaN or infinite; nothing was saved since, so that the last checkpoint stays good."""


def check_finite(counter: str, number: int, values: Mapping[str, float], advice: str) -> None:
    """Raise DivergedError naming the metrics that are not finite, and when: `counter` (iteration, update) `number`."""
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{counter} {number}: {', '.join(bad)}. The training has diverged; nothing was saved since then. {advice}"
        )


class SignalWatch:
    """Counts the iterations in a row in which no step was made because all groups were dead."""

    def __init__(self) -> None:
        self.skipped = 0
        """Iterations without an update so far, of those that were watched."""
        self._row = 0

    def watch(self, iteration: int, skipped: float) -> str:
        """Take an iteration's share of skipped steps; return a warning when it is time for one, else ""."""
        self._row = self._row + 1 if skipped == 1 else 0
        self.skipped += skipped == 1
        if self._row not in WARN_AFTER:
            return ""
        return (
            f"warning: iterations {iteration - self._row + 1} to {iteration} made no update: all images of a prompt "
            "got the same score, for every prompt (dead_groups is 1), so that there is nothing to learn from and the "
            "weights stay as they are. Look at the scores: a scorer that always says the same, prompts that are all "
            "too hard or too easy, or a rollout.group_size that is too small."
        )

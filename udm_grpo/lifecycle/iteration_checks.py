"""Checks of an iteration's metrics: stop at non-finite values, warn when there is nothing to learn from."""

import math
from collections.abc import Mapping

from rewards_bridge.errors import UserError

WARN_AFTER = (3, 30, 300, 3000)
"""Consecutive iterations without an update after which to warn."""


class DivergedError(UserError, RuntimeError):
    """A number of the training is NaN or infinite; nothing was saved since, so the last checkpoint is still good."""


def check_finite(counter: str, number: int, values: Mapping[str, float], advice: str) -> None:
    """Raise DivergedError if metrics are not finite, naming them and when: `counter` (iteration, update) `number`."""
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{counter} {number}: {', '.join(bad)}. The training has diverged; nothing was saved since then. {advice}"
        )


class SignalWatch:
    """Counts consecutive iterations whose updates were all skipped because every group was dead."""

    def __init__(self) -> None:
        self.skipped = 0
        """Number of watched iterations without an update."""
        self._row = 0

    def watch(self, iteration: int, skipped: float) -> str:
        """Record an iteration's fraction of skipped updates; return a warning if one is due, else ""."""
        self._row = self._row + 1 if skipped == 1 else 0
        self.skipped += skipped == 1
        if self._row not in WARN_AFTER:
            return ""
        return (
            f"warning: iterations {iteration - self._row + 1} to {iteration} made no update: for every prompt, all "
            "images got the same score (dead_groups is 1), so there is nothing to learn from and the weights do not "
            "change. Look at the scores. Likely causes: a scorer that always returns the same score, prompts that are "
            "all too hard or too easy, or a rollout.group_size that is too small."
        )

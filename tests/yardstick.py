"""Measure the machine's present speed, so that time bounds hold on busy machines and slower cores, too.

    assert seconds < 2 * slowdown()

Processor time alone does not suffice: other processes on the same cores and caches increase it as well.
"""

import json
import time

QUIET_S = 0.25
"""Seconds of the yardstick on the idle machine for which the bounds were set."""


def slowdown() -> float:
    """Return the yardstick's present time relative to QUIET_S; at least 1, so that no bound gets tighter."""
    rows = [{"prompt": f"a photo of {i} cats", "tag": "counting", "include": [{"count": i}]} for i in range(20_000)]
    began = time.process_time()
    for row in rows:
        json.loads(json.dumps(row))
    return max(1.0, (time.process_time() - began) / QUIET_S)

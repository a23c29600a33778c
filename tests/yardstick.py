"""How fast this machine is now, so that a bound in seconds means the same beside busy neighbours and on slower cores.

    assert seconds < 2 * slowdown()

Processor time is no measure by itself: neighbours on the same cores and caches slow a process down in it, too.
"""

import json
import time

QUIET_S = 0.25
"""What the yardstick takes on the machine that bounds were set on, when nothing else runs there."""


def slowdown() -> float:
    """How many times longer the yardstick takes now than it did there; at least 1, so that no bound gets tighter."""
    rows = [{"prompt": f"a photo of {i} cats", "tag": "counting", "include": [{"count": i}]} for i in range(20_000)]
    began = time.process_time()
    for row in rows:
        json.loads(json.dumps(row))
    return max(1.0, (time.process_time() - began) / QUIET_S)

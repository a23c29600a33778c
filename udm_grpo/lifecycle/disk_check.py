"""How much disk a run will need, compared with what is free before anything is loaded."""

import math
import sys
from pathlib import Path

from udm_grpo.batches import Params, TrainState
from udm_grpo.checkpoints.checkpoint import Checkpoints
from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.files.buckets import local
from udm_grpo.files.disk_space import files_bytes, start_problem, tree_bytes
from udm_grpo.multihost import hosts


def check_space(config: RunConfig, state: TrainState, whole: Params) -> None:
    """Raise ConfigError if the next checkpoint does not fit the disk; warn if not all of the run's files will.

    state: abstract, what is trained; whole: the abstract start model, whose frozen copy in the compute dtype is part
    of every checkpoint. Process 0 looks, and all processes raise.
    """
    if "://" in config.output_dir:
        return

    def look() -> list[str]:
        folder = Path(config.output_dir) / "checkpoints"
        return list(start_problem(folder, *needed_bytes(config, state, whole, folder)))

    error, warning = hosts.from_primary(look)
    if error:
        raise ConfigError(error)
    if warning and hosts.is_primary():
        print(f"warning: {warning}", file=sys.stderr)


def needed_bytes(config: RunConfig, state: TrainState, whole: Params, folder: Path) -> tuple[int, int]:
    """Return (bytes of a checkpoint, bytes that the run will need beyond the first one, exports included)."""
    given = config.checkpoint
    width = 2 if config.model.dtype == "bfloat16" else 4
    values = tree_bytes(whole) // 4  # it is abstract in float32
    size = tree_bytes(state) + values * width
    resumed = len(Checkpoints(folder, given.keep).steps()) if given.resume == "latest" else 0
    saves = math.ceil(config.iterations / given.every) if given.every else 1
    at_a_time = max(1, min(given.keep + 1 - min(resumed, given.keep), saves))
    # One for each checkpoint that is kept, the newest, and the next, which is written before any is deleted.
    best = (given.keep + 2) * tree_bytes(state.params) if given.keep_best else 0
    exports = (1 if state.ema is None else 2) * files_bytes(local(config.model.path) / "transformer")
    return size, (at_a_time - 1) * size + best + exports

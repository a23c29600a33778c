"""Estimate how much disk space a run needs and compare it with what is free, before anything is loaded."""

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
    """Raise ConfigError if the next checkpoint does not fit on the disk; warn if the run's files together do not.

    state: the abstract training state; whole: the abstract start model, whose frozen copy in the compute dtype is part
    of every checkpoint. Process 0 checks, and all processes raise.
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
    """Return (bytes of one checkpoint, bytes that the run needs beyond the first one, exports included)."""
    settings = config.checkpoint
    width = 2 if config.model.dtype == "bfloat16" else 4
    values = tree_bytes(whole) // 4  # it is abstract in float32
    size = tree_bytes(state) + values * width
    resumed = len(Checkpoints(folder, settings.keep).steps()) if settings.resume == "latest" else 0
    saves = math.ceil(config.iterations / settings.every) if settings.every else 1
    at_a_time = max(1, min(settings.keep + 1 - min(resumed, settings.keep), saves))
    # One for each checkpoint that is kept, the newest, and the next, which is written before any is deleted.
    best = (settings.keep + 2) * tree_bytes(state.params) if settings.keep_best else 0
    exports = (1 if state.ema is None else 2) * files_bytes(local(config.model.path) / "transformer")
    return size, (at_a_time - 1) * size + best + exports

"""A run in Weights & Biases: opened once, continued when training resumes, and never a reason for training to fail.

The API key is read by the wandb package itself (WANDB_API_KEY or `wandb login`); this program never sees or writes it.
Without the package nothing is written there; without a key or a connection, the run is kept offline in OUTPUT_DIR/wandb
for `wandb sync`.
"""

import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards_bridge.redaction import redacted_values
from udm_grpo.config import LoggingConfig
from udm_grpo.files.atomic import replace_file

FILE = "wandb_run_id.txt"
"""File in output_dir with the id of the run, by which a resumed training continues it."""
SYNC = "upload it later with `wandb sync`"


class WandbRun:
    """An open run; the first failure to write is a warning, and nothing more is written."""

    def __init__(self, wandb: types.ModuleType, run: Any):
        self._wandb, self._run = wandb, run

    def log(self, values: Mapping[str, Any], picture: tuple[str, Path] | None = None) -> None:
        """Write numbers and, optionally, a picture (its name and its PNG)."""
        if self._run is None:
            return
        try:
            shown = {picture[0]: self._wandb.Image(str(picture[1]))} if picture else {}
            self._run.log({**values, **shown})
        except Exception as error:
            self._run = None
            _warn(f"stopped accepting this run's numbers ({_text(error)}); training continues without it")

    def finish(self) -> None:
        """Close the run."""
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            _warn(f"did not close the run ({_text(error)}); {SYNC}")


def wandb_problem() -> str:
    """Return why Weights & Biases will not show the run live, and what to do; "" if no problem is known."""
    wandb = _import_wandb()
    if wandb is None:
        return "wandb is not installed, so nothing is written there: pip install wandb, or set logging.wandb=False"
    if not _may_log_in(wandb):
        return (
            "no API key is known, so the run is kept offline in output_dir/wandb: run `wandb login` or set "
            f"WANDB_API_KEY before the start, or {SYNC}"
        )
    return ""


def open_wandb(
    output_dir: Path, resume_after: int | None, logging: LoggingConfig, config: Mapping[str, Any] | None
) -> WandbRun | None:
    """Open a run, or continue the one that OUTPUT_DIR/wandb_run_id.txt names when `resume_after` is not None.

    logging.wandb_id takes precedence over the file. Secrets of `config` are left out. If wandb cannot open a run
    online, it is opened offline; if that fails, too, the return value is None. Both are warnings.
    """
    wandb = _import_wandb()
    if wandb is None:
        _warn(f"will not show this run: {wandb_problem()}")
        return None
    file = output_dir / FILE
    stored = file.read_text(encoding="utf-8").strip() if resume_after is not None and file.exists() else ""
    name = logging.wandb_name or ("" if stored else output_dir.resolve().name)  # keep a name that was changed there
    options = {
        "project": logging.wandb_project,
        "name": name or None,
        "dir": str(output_dir),
        "config": redacted_values(config or {}),
        "id": logging.wandb_id or stored or None,
        "resume": "allow",
    }
    try:
        run = _init(wandb, options)
        run.define_metric("*", step_metric="step")
        identity = str(run.id)
    except Exception as error:
        _warn(f"could not open a run in project {logging.wandb_project!r}, not even offline ({_text(error)})")
        return None
    replace_file(file, lambda temporary: temporary.write_text(identity, encoding="utf-8"))
    return WandbRun(wandb, run)


def _init(wandb: types.ModuleType, options: dict[str, Any]) -> Any:
    """Return a run, online if possible. Without a key wandb would ask for one on a terminal, and wait."""
    if _may_log_in(wandb):
        try:
            return wandb.init(**options)
        except Exception as error:
            place = f"project {options['project']!r}"
            advice = f"run `wandb login` or set WANDB_API_KEY if that is missing; {SYNC}"
            _warn(f"could not open a run in {place} ({_text(error)}); it is kept offline: {advice}")
    return wandb.init(**options, mode="offline")


def _import_wandb() -> types.ModuleType | None:
    try:
        import wandb
    except Exception:  # also one that is installed and broken
        return None
    return wandb


def _may_log_in(wandb: types.ModuleType) -> bool:
    """Return whether wandb has a key, needs none, or does not say."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    try:
        return bool(wandb.api.api_key)
    except Exception:
        return True


def _warn(text: str) -> None:
    print(f"warning: Weights & Biases {text}", file=sys.stderr, flush=True)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

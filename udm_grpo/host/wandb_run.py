"""A run in Weights & Biases: opened once, continued when training resumes.

The API key is read by the wandb package itself (WANDB_API_KEY or `wandb login`); this program never sees or writes it.
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from udm_grpo.config import ConfigError, LoggingConfig
from udm_grpo.host.atomic import replace_file
from udm_grpo.host.redaction import HIDDEN, hide_logins, is_secret

FILE = "wandb_run_id.txt"
"""In output_dir: the id of its run, by which a resumed training continues it."""


def import_wandb() -> types.ModuleType:
    """Return the wandb package; raises ConfigError with the command that installs it."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "logging.wandb is True, but wandb is not installed: pip install wandb, or set logging.wandb=False."
        ) from None
    return wandb


def open_wandb(
    output_dir: Path, resume_after: int | None, logging: LoggingConfig, config: Mapping[str, Any] | None
) -> Any:
    """Open a run, or continue the one that OUTPUT_DIR/wandb_run_id.txt names when `resume_after` is not None.

    logging.wandb_id takes precedence over the file. Secrets of `config` are left out. Raises ConfigError if wandb is
    not installed or cannot open the run (not logged in, no connection).
    """
    wandb = import_wandb()
    file = output_dir / FILE
    stored = file.read_text(encoding="utf-8").strip() if resume_after is not None and file.exists() else ""
    name = logging.wandb_name or ("" if stored else output_dir.resolve().name)  # keep a name that was changed there
    try:
        run = wandb.init(
            project=logging.wandb_project,
            name=name or None,
            dir=str(output_dir),
            config=_without_secrets(config or {}),
            id=logging.wandb_id or stored or None,
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"Weights & Biases could not open a run in project {logging.wandb_project!r}: {error}\nRun `wandb login`, "
            "or set WANDB_API_KEY, WANDB_MODE=offline or logging.wandb=False."
        ) from error
    run.define_metric("*", step_metric="step")
    replace_file(file, lambda temporary: temporary.write_text(run.id, encoding="utf-8"))
    return run


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _shown(str(name), value) for name, value in values.items()}


def _shown(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_secrets(value)
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else hide_logins(value)
    return value

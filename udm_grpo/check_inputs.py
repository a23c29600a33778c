"""Check that what a training reads is on this machine: the start model, the prompt files, files of remote scorers.

    python -m udm_grpo.check_inputs --config configs/geneval.py --config.output_dir=/mnt/shared/run

It reads them as a training does, and with JAX_PLATFORMS=cpu leaves the accelerator alone. scripts/launch_tpu_pod.sh
runs it on every worker before it starts a training.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewards_bridge.errors import USER_ERROR_STATUS, UserError
from rewards_bridge.redaction import guarded
from udm_grpo.config import RunConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.data.prompts import read_prompts
from udm_grpo.files.buckets import local, local_prompts
from udm_grpo.released.weights import load_folder


def _error(read: Callable[[], Any]) -> str:
    try:
        read()
    except (UserError, OSError) as error:
        return str(error)
    return ""


def problems(config: RunConfig) -> Iterator[str]:
    """Yield a line for everything that `config` names and this machine cannot read."""
    model, prompts, length = config.model, config.prompts, config.model.text_length or None
    checks = {
        "model.path": lambda: load_folder(local(model.path), "float32", length, False, model.transformer or None),
        "prompts.train": lambda: read_prompts(local_prompts(prompts.train), prompts.tag_weights or None),
        "prompts.heldout": lambda: read_prompts(local_prompts(prompts.heldout)),
    }
    yield from (f"{name}: {error}" for name, read in checks.items() if (error := _error(read)))
    for name, scorer in config.rewards.scorers.items():
        for field, file in (("tls_ca", scorer.tls_ca), ("token_file", scorer.token_file)):
            if file and not Path(file).is_file():
                yield f"rewards.scorers.{name}.{field}: no such file {file}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if everything is there, else that of a user's mistake."""
    try:
        config = parse(list(sys.argv[1:] if argv is None else argv))
        validate(config)
        found = list(problems(config))
    except (UserError, OSError) as error:
        found = [str(error)]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print("the start model and the prompt files are there")
    return USER_ERROR_STATUS if found else 0


if __name__ == "__main__":
    sys.exit(guarded(main))

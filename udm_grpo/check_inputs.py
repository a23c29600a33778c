"""Check that this machine can read the inputs of a training run: start model, prompts, files of remote scorers.

    python -m udm_grpo.check_inputs --config configs/geneval.py --config.output_dir=/mnt/shared/run

It reads them as training does; with JAX_PLATFORMS=cpu it does not use the accelerator. scripts/launch_tpu_pod.sh runs
it on every worker before it starts training.
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
    """Yield a line for every input of `config` that this machine cannot read."""
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
    """Run the command line; return 0 if all inputs can be read, else the exit status of a user error."""
    try:
        config = parse(list(sys.argv[1:] if argv is None else argv))
        validate(config)
        errors = list(problems(config))
    except (UserError, OSError) as error:
        errors = [str(error)]
    for line in errors:
        print(f"error: {line}", file=sys.stderr)
    if not errors:
        print("the start model and the prompt files can be read")
    return USER_ERROR_STATUS if errors else 0


if __name__ == "__main__":
    sys.exit(guarded(main))

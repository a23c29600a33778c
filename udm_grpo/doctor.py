"""Check that a run has everything it needs before it starts: packages, files, GPUs, scorers.

    python -m udm_grpo.doctor --config configs/geneval.py [--config.field=value ...]

The arguments are those of udm_grpo.train. Packages are checked where each part runs (a scorer in its own interpreter),
files where the configuration reads them; scorers at an address are contacted. Every command that it prints puts its
file where this configuration expects it. Exit status: 0 everything is ready, 1 something is missing, 2 the command line
is invalid.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards_bridge.redaction import guarded

ROOT = Path(__file__).resolve().parent.parent
TRAINER = (
    *("absl", "flax", "grpc", "jax", "jaxtyping", "ml_collections", "numpy", "optax", "orbax", "PIL", "safetensors"),
    *("tokenizers", "tqdm", "transformers"),
)
"""Modules that the trainer imports."""


def missing_modules(names: Sequence[str]) -> list[str]:
    """Return the modules that this interpreter does not have."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    missing = missing_modules(TRAINER)
    if missing:
        print(f"trainer: {', '.join(missing)} cannot be imported by {sys.executable}")
        print(f"  fix: {sys.executable} -m pip install -r {ROOT / 'requirements.txt'}")
        return 1
    environment = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: files are read without taking a device
    try:
        from udm_grpo import devices
        from udm_grpo.lifecycle import run_needs  # they need the packages that were checked above

        devices.prepare()
        return run_needs.report(words, environment)
    finally:
        os.environ.pop("JAX_PLATFORMS")
        os.environ.update(environment)


if __name__ == "__main__":
    sys.exit(guarded(main))

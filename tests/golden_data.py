"""Golden numbers computed by the public PyTorch release: where they are stored and how to compare with them.

`UDM_GRPO_GOLDEN` names one golden folder (it holds golden.npz) or a folder of several; unset, `tests/golden/*` is used.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEFAULT_ROOT = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One golden folder.

    path: the folder; checkpoint: the released model folder in it; reference: the reference transformer's file;
    setup: setup.json (sizes, L, grid hw); prompts: the texts of prompt_ids; arrays: golden.npz, read-only.
    """

    path: Path
    setup: Mapping[str, Any]
    prompts: tuple[str, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def reference(self) -> Path:
        return self.path / "reference_transformer.safetensors"


@functools.cache
def _load(path: Path) -> GoldenCase:
    with np.load(path / "golden.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for array in arrays.values():
        array.flags.writeable = False
    setup = json.loads((path / "setup.json").read_text())
    return GoldenCase(path, setup, tuple(json.loads((path / "prompts.json").read_text())), arrays)


def golden_paths() -> list[Path]:
    """Return the golden folders, sorted by name; raises FileNotFoundError if there are none."""
    root = Path(os.environ.get("UDM_GRPO_GOLDEN") or DEFAULT_ROOT)
    if (root / "golden.npz").is_file():
        return [root]
    paths = sorted(file.parent for file in root.glob("*/golden.npz"))
    if not paths:
        raise FileNotFoundError(f"no golden.npz in {root} or in a folder of it; set UDM_GRPO_GOLDEN to a golden folder")
    return paths


def golden_cases() -> pytest.MarkDecorator:
    """Return a parametrisation over all golden folders: it decorates a test with an argument `case: GoldenCase`."""
    paths = golden_paths()
    return pytest.mark.parametrize("case", [_load(path) for path in paths], ids=[path.name for path in paths])


def first_case() -> GoldenCase:
    """Return one golden case, for tests that do not depend on the numbers."""
    return _load(golden_paths()[0])


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Assert that the largest difference is at most `tolerance` times the largest value of `expected`."""
    array = np.asarray(actual)
    assert array.shape == expected.shape, f"shape {array.shape}, expected {expected.shape}"
    assert np.isfinite(array).all(), "not finite"
    largest = float(np.abs(expected).max())
    error = float(np.abs(array.astype(np.float64) - expected.astype(np.float64)).max()) / max(largest, 1e-30)
    message = f"largest difference is {error:.2e} of the largest value {largest:.3g}, allowed {tolerance:.0e}"
    assert error <= tolerance, message

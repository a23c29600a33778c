"""Strict numerics for every test (no implicit rank or dtype promotion, no key reuse) and one compilation cache."""

import atexit
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "UDM_GRPO_COMPILED" not in os.environ:
    # One compilation cache for all processes of a test run: workers and the processes that tests start inherit it.
    os.environ["UDM_GRPO_COMPILED"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["UDM_GRPO_COMPILED"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHON", None)  # names the interpreter of .ci/run; launch scripts read it, too
# A test run in the background of a script (nohup) ignores these signals, and so would all processes that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax
import pytest
from jaxtyping import install_import_hook

from rewards_bridge import redaction
from rewards_bridge.scorers.torchvision_ops import declare_operators

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
# Array shapes in these packages' signatures are checked in tests only, so they cost nothing in production.
install_import_hook(["udm_grpo.model", "udm_grpo.diffusion", "udm_grpo.grpo"], "beartype.beartype")


LONGEST = (
    "rehearsal_recipes",
    "rehearsal_readme",
    "train",
    "launch_runs",
    "lora",
    "install",
    "demo",
    "buckets",
    "sample",
)
"""The X of the test_X.py files that take minutes; they start first, so that no worker is left alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the LONGEST files first; the others keep their order."""
    order = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


TORCH_MODELS = re.compile(r"^\s*(import|from) (torch|transformers|peft|open_clip|clip_helpers|standins)\b", re.M)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Declare torchvision's operators before a test module imports models of libraries that import torchvision."""
    if TORCH_MODELS.search(module_path.read_text(encoding="utf-8")):
        declare_operators()


@pytest.fixture(autouse=True)
def forgotten_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the secrets of earlier tests."""
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """Compile without most optimizations until the end of the module: here they take longer than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

"""Strict numerics for every test (no silent rank or dtype promotion, no key used twice); one cache of compiled code."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "UDM_GRPO_COMPILED" not in os.environ:
    # What one process of a test run compiles the others find: workers and the processes that tests start inherit this.
    os.environ["UDM_GRPO_COMPILED"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["UDM_GRPO_COMPILED"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
# Shapes in the signatures of the pure middle are checked in tests and free in production.
install_import_hook(["udm_grpo.model", "udm_grpo.diffusion", "udm_grpo.grpo"], "beartype.beartype")


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """From here to the end of the module, compile without most optimizations: they take longer than what they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

"""Strict numerics for every test: no silent rank or dtype promotion, no key used twice."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
# Shapes in the signatures of the pure middle are checked in tests and free in production.
install_import_hook(["udm_grpo.model", "udm_grpo.diffusion", "udm_grpo.grpo"], "beartype.beartype")

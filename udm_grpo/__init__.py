"""UDM-GRPO: reinforcement learning of uniform discrete diffusion models for text-to-image, in JAX."""

import os
import sys

_variables = [name for name in os.environ if name.startswith("JAX_")]
if sys.argv[:1] == ["-m"] and _variables:
    # A command. JAX refuses a value that it cannot read when it is imported, by a traceback.
    try:
        import jax  # noqa: F401
    except ValueError as error:
        _named = [name for name in _variables if name.lower() in str(error).lower()] or _variables
        sys.exit(f"error: JAX cannot read {', '.join(_named)} in the environment: {error}; correct or unset it.")

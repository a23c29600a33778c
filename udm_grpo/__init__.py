"""UDM-GRPO: reinforcement learning of uniform discrete diffusion models for text-to-image, in JAX."""

import os
import signal
import sys
from types import TracebackType


def _in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what ended a command while its modules were imported, where that is no fault of theirs."""
    named = [name for name in os.environ if name.startswith("JAX_") and name.lower() in str(error).lower()]
    if issubclass(kind, ValueError) and named:
        says = f"JAX cannot read {', '.join(named)} in the environment: {error}"
        print(f"error: {says}; correct or unset it.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m udm_grpo.COMMAND
    sys.excepthook = _in_a_line
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until `guarded` runs the command: KeyboardInterrupt within a library that is being loaded can crash it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

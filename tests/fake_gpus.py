"""A simulated machine with GPUs, as nvidia-smi would list them."""

import os
from pathlib import Path


def machine(folder: Path, count: int, **variables: str) -> dict[str, str]:
    """Return the environment of a machine with `count` GPUs, which the trainer uses."""
    program = folder / "nvidia-smi"
    lines = "".join(
        f"echo '{index}, GPU-{index}{index}aa-bb, 81559, NVIDIA H100 80GB HBM3'\n" for index in range(count)
    )
    program.write_text(f"#!/bin/sh\n{lines}{'' if count else 'exit 9'}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin", "JAX_PLATFORMS": "cuda", **variables}

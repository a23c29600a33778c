"""Declare torchvision's operators where its compiled library does not load, i.e. with a CPU build of torch.

The released wheel of torchvision is linked against CUDA. With a CPU build of torch its library cannot be loaded, and
`import torchvision` fails because it describes two operators that were never declared. So do `import timm`,
`import open_clip` and every torch model of transformers, all of which import torchvision if it is installed. Declaring
the two operators is sufficient; no scorer calls them.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""The operators that torchvision 0.28 describes on import, even if its library was not loaded."""


@functools.cache  # also keeps the Library alive, whose declarations end with it
def declare_operators() -> Library | None:
    """Make `import torchvision` work with any build of torch, and return the declared library.

    Return None if nothing is missing: torchvision is not installed, already imported, or its library loads. Call this
    before the first import of torchvision, timm, open_clip or a torch model of transformers.
    """
    if "torchvision" in sys.modules:
        return None
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    import torch

    libraries = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        if libraries:
            torch.ops.load_library(str(libraries[0]))
            return None
    except OSError:  # it is linked against libraries that this build of torch lacks
        pass
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        declared.define(operator)
    return declared

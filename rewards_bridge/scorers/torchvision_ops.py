"""torchvision's operators, declared where its compiled part does not load: beside a CPU build of torch.

The released wheel of torchvision is linked against CUDA. Beside a CPU build of torch its library cannot be loaded, and
`import torchvision` then fails because it describes two operators that were never declared. So do `import timm`,
`import open_clip` and every torch model of transformers, which all import torchvision when it is installed. Declaring
the two operators is enough; none of the scorers calls them.
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
"""What torchvision 0.28 describes at import, whether or not its library was loaded."""


@functools.cache  # keeps the Library alive as well: the declarations end with it
def declare_operators() -> Library | None:
    """Make `import torchvision` possible beside any build of torch, and return what was declared for that.

    Return None where nothing is missing: torchvision is not installed, is imported already, or its library loads.
    Call it before the first import of torchvision, timm, open_clip or a torch model of transformers.
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
    except OSError:  # it is linked against libraries that this build of torch does not have
        pass
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        declared.define(operator)
    return declared

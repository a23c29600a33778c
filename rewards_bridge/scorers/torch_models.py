"""The models of transformers that scorers use; always import them from this module.

transformers imports torchvision when a model is imported, which fails with a CPU build of torch unless torchvision's
operators are declared first (see torchvision_ops.py). This module does both in the right order.
"""

from rewards_bridge.scorers.torchvision_ops import declare_operators

declare_operators()

from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    SwinConfig,
)
from transformers.utils import cached_file  # noqa: E402

__all__ = [
    "CLIPConfig",
    "CLIPImageProcessorPil",
    "CLIPModel",
    "CLIPTokenizer",
    "Mask2FormerConfig",
    "Mask2FormerForUniversalSegmentation",
    "PreTrainedModel",
    "SwinConfig",
    "cached_file",
]

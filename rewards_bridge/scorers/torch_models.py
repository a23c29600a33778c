"""The models of transformers that scorers use; import them from here.

transformers imports torchvision as soon as a model is asked for, which fails beside a CPU build of torch unless
torchvision's operators are declared first (see torchvision_ops.py). This module does both in the right order.
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

"""ImageReward, through its own package: an example of a scorer that needs an interpreter of its own.

The package needs an older transformers than the other scorers. Create a virtual environment for it, set its Python in
the config as rewards.interpreter, and install there the requirements.txt of this package and, with the command in the
error below, those of ImageReward. This file imports no large package until a scorer is created.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores, check_batch, cut_text

MODEL = "ImageReward-v1.0"
PACKAGES = (
    "image-reward==1.5",
    "openai-clip==1.0.1",  # imported by image-reward, which does not declare it
    "setuptools==69.5.1",  # the last version with the pkg_resources.packaging that openai-clip imports
    "transformers==4.51.3",  # later versions moved or dropped what image-reward imports
    "torch==2.10.0",  # later versions need a newer setuptools
    "torchvision==0.25.0",
)
TEXT_TOKENS = 35
"""The package truncates prompts to this length, including the start and end tokens."""
SAFE_TORCH = (2, 6)
"""The first torch version that loads with weights_only by default; the package does not set it."""


class ImageRewardScorer:
    """Scores images by ImageReward: score = raw "imagereward" = its reward, of mean 0 and deviation 1 on its own data.

    model: ImageReward-v1.0, which is downloaded, or its file ImageReward.pt. med_config: its file med_config.json;
    empty: download it. device: cpu, cuda:0, ... Only the first 35 tokens of a prompt count, including the start and end
    tokens. Raises UsageError, with the command that fixes it, if the package is missing or does not load.

    Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation".
    """

    def __init__(self, model: str = MODEL, med_config: str = "", device: str = "cpu") -> None:
        package, self._torch = _import()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the package reports its progress with print
                self._model = package.load(model, device=device, med_config=med_config or None)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"scorer 'imagereward': cannot load {model!r} ({str(error).splitlines()[0][:200]}). Download it with: "
                "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ImageReward; and set the "
                "options model=ImageReward/ImageReward.pt and med_config=ImageReward/med_config.json. It also needs "
                "the tokenizer bert-base-uncased in the cache: "
                "hf download bert-base-uncased --include '*.txt' --include '*.json'"
            ) from error

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return a note if the prompt is longer than the model reads; otherwise ""."""
        tokens = self._model.blip.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        return cut_text(TEXT_TOKENS) if len(tokens) > TEXT_TOKENS else ""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] of any size for their prompts, one by one; ValueError for another form."""
        check_batch("imagereward", images, prompts, metadata)
        with self._torch.no_grad():
            marks = [
                self._model.score(prompt, Image.fromarray(image)) for prompt, image in zip(prompts, images, strict=True)
            ]
        raw = np.array(marks, dtype=np.float32)
        return Scores(score=raw, raw={"imagereward": raw}, reasons=[""] * len(raw))


def _import() -> tuple[ModuleType, ModuleType]:
    """Return the packages ImageReward and torch; UsageError if one is missing, too new or too old."""
    command = " ".join([sys.executable, "-m pip install", *(f'"{package}"' for package in PACKAGES)])
    remedy = f"Install it with: {command}; or set another interpreter as rewards.interpreter"
    try:
        import ImageReward
        import torch
    except ImportError as error:  # also if the installed transformers is incompatible
        raise UsageError(f"scorer 'imagereward': cannot import the package ImageReward ({error}). {remedy}") from error
    version = torch.__version__
    if tuple(int(number) for number in version.split(".")[:2]) < SAFE_TORCH:
        raise UsageError(
            f"scorer 'imagereward': torch {version} may run code from a weights file; expected 2.6 or newer. {remedy}"
        )
    return ImageReward, torch

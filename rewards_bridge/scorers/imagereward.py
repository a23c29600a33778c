"""ImageReward, through its own package: an example of a scorer that needs an interpreter of its own.

The package wants an older transformers than the other scorers. Make a virtual environment for it, name its Python in
the config as rewards.interpreter, and install there what this package needs (requirements.txt here) and the command
that the error below prints. This file imports nothing else of weight until a scorer is made.
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
    "openai-clip==1.0.1",  # imported by image-reward, which does not ask for it
    "setuptools==69.5.1",  # the last with the pkg_resources.packaging that openai-clip imports
    "transformers==4.51.3",  # image-reward imports what later ones have moved or dropped
    "torch==2.10.0",  # later ones want a newer setuptools
    "torchvision==0.25.0",
)
TEXT_TOKENS = 35
"""To which the package cuts prompts, with those for the start and the end."""
SAFE_TORCH = (2, 6)
"""The first torch that loads with weights_only unless told otherwise; the package does not tell it."""


class ImageRewardScorer:
    """Scores images by ImageReward: score = raw "imagereward" = its reward, of mean 0 and deviation 1 on its own data.

    model: ImageReward-v1.0, to be downloaded, or its file ImageReward.pt; med_config: its file med_config.json, empty:
    to be downloaded. device: cpu, cuda:0, ... Only the first 35 tokens of a prompt count, those for its
    start and end among them. Raises UsageError, with the command that fixes it, if the package is missing or does not
    load.

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
                "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ImageReward; and give the "
                "options model=ImageReward/ImageReward.pt and med_config=ImageReward/med_config.json. It also needs "
                "the tokenizer bert-base-uncased in the cache: "
                "hf download bert-base-uncased --include '*.txt' --include '*.json'"
            ) from error

    def note(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Return that only the beginning of a prompt counts, if it is longer than the model reads."""
        tokens = self._model.blip.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]
        return cut_text(TEXT_TOKENS) if len(tokens) > TEXT_TOKENS else ""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Judge images u8[B,H,W,3] of any size for their prompts, one by one; ValueError for another form."""
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
    remedy = f"Install it with: {command}; or name another interpreter as rewards.interpreter"
    try:
        import ImageReward
        import torch
    except ImportError as error:  # also where it is installed beside a transformers that it cannot work with
        raise UsageError(f"scorer 'imagereward': cannot import the package ImageReward ({error}). {remedy}") from error
    found = torch.__version__
    if tuple(int(number) for number in found.split(".")[:2]) < SAFE_TORCH:
        raise UsageError(
            f"scorer 'imagereward': torch {found} may run code that a weights file holds, wanted 2.6 or newer. {remedy}"
        )
    return ImageReward, torch

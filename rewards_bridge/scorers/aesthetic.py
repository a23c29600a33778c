"""The LAION aesthetic predictor: how beautiful people find an image, regardless of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores, check_batch
from rewards_bridge.scorers.clip_files import Source, load_tensors, refuse_differences
from rewards_bridge.scorers.clip_model import load_clip

MODEL = "openai/clip-vit-large-patch14"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Layer number in the published head -> output width. The missing numbers are dropout, which is inactive here."""
SCALE = 10.0


class AestheticScorer:
    """Scores images by a linear head on CLIP ViT-L/14: raw "aesthetic" = the predicted rating, score = raw / 10.

    People rated images from 1 to 10; the prediction is not limited to that range. The input of the head is the image's
    embedding of length 1. head: its file, .pth (read with weights_only) or .safetensors. model: hub name or folder of
    the CLIP, in the format of transformers or of open_clip. device: cpu, cuda:0, ...; dtype: of the CLIP, float32,
    float16 or bfloat16 (the head is float32); batch_size: images at a time. Raises UsageError for files that are
    missing or have another layout, and for invalid options.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.
    """

    def __init__(
        self,
        head: str = "",
        model: str = MODEL,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        source = Source("aesthetic", "model", model, MODEL)
        file = Source("aesthetic", "head", head, MODEL)
        if not file.path.is_file():
            raise UsageError(
                f"scorer 'aesthetic': head={head!r} is not a file. Download the published head with: "
                f"curl -L -o {HEAD} {HEAD_URL}{HEAD.replace('+', '%2B')}; and set the option head={HEAD}"
            )
        self.clip = load_clip(source, source, device, dtype, batch_size)
        width = self.clip.embed_images(np.zeros((1, 8, 8, 3), np.uint8)).shape[-1]
        self._layers = _check_head(file, load_tensors(file, file.path), width)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] of any size; prompts and metadata are only counted. ValueError for another form."""
        check_batch("aesthetic", images, prompts, metadata)
        marks = torch.from_numpy(self.clip.embed_images(images))
        for weight, bias in self._layers:
            marks = torch.nn.functional.linear(marks, weight, bias)
        raw = marks[:, 0].numpy()
        return Scores(score=raw / np.float32(SCALE), raw={"aesthetic": raw}, reasons=[""] * len(raw))


def _check_head(
    file: Source, tensors: Mapping[str, torch.Tensor], width: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (weight, bias) of every layer in float32; UsageError for missing or extra tensors or wrong shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer, returned in LAYERS.items():
        expected |= {f"layers.{layer}.weight": (returned, width), f"layers.{layer}.bias": (returned,)}
        width = returned
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    misshapen = {
        name: (shapes[name], shape) for name, shape in expected.items() if name in shapes and shapes[name] != shape
    }
    refuse_differences(file, expected.keys() - shapes.keys(), shapes.keys() - expected.keys(), misshapen)
    return [(tensors[f"layers.{layer}.weight"].float(), tensors[f"layers.{layer}.bias"].float()) for layer in LAYERS]

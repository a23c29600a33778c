"""The colour of a detected object, determined as in GenEval: the best match of CLIP among ten colours.

The reference is open_clip's ViT-L-14 with OpenAI's weights: timm/vit_large_patch14_clip_224.openai, or the same weights
(and the same quick GELU) as openai/clip-vit-large-patch14. This module resizes images to CLIP's input size as open_clip
does, because for some sizes transformers' own processor crops the centre one pixel off.

Source: Ghosh et al. 2023, "GenEval"; Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards_bridge.scorers.clip_files import Source
from rewards_bridge.scorers.clip_model import Towers, load_towers

MODEL = "openai/clip-vit-large-patch14"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99  # the grey level outside the mask
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # RGB, of levels 0..1
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


class ClipColors:
    """Classifies the colours of objects; text features are computed once per class."""

    def __init__(self, towers: Towers) -> None:
        self.towers = towers
        self.classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def tell(self, image: np.ndarray, box: Sequence[float], mask: np.ndarray, name: str) -> str:
        """Return the most likely colour, one of COLORS, of an object of class `name`.

        image u8[H,W,3] (RGB), box [x0, y0, x1, y1] in pixels, x1 and y1 excluded, and mask bool[H,W] of the object.
        """
        if name not in self.classifiers:
            self.classifiers[name] = self.classifier(name)
        pixels = to_pixels(cut_out(image, box, mask), self.towers.side)
        features = self.towers.image_features(pixels[None])
        return COLORS[int((self.classifiers[name] @ _unit(features)[0]).argmax())]

    @torch.inference_mode()
    def classifier(self, name: str) -> Tensor:
        """Return the text directions f32[10,D] of a class in each of COLORS: means of unit vectors over TEMPLATES."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        features = self.towers.text_features(texts)
        return _unit(_unit(features).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def cut_out(image: np.ndarray, box: Sequence[float], mask: np.ndarray) -> Image.Image:
    """Return the crop of an image u8[H,W,3] to a box, with everything outside the mask bool[H,W] painted grey."""
    painted = np.where(mask[..., None], image, np.uint8(GREY))
    left, top, right, bottom = (round(side) for side in box)
    return Image.fromarray(painted).crop((left, top, right, bottom))


def to_pixels(picture: Image.Image, size: int) -> Tensor:
    """Return CLIP's input f32[3,size,size]: the shorter side resized to `size`, centre-cropped and normalised."""
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in (width, height))  # rounds half to even, as torchvision
    levels = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((levels - MEAN) / STD).permute(2, 0, 1)


def load_colors(name: str, device: torch.device) -> ClipColors:
    """Load a ClipColors on a device; name: a folder of transformers or open_clip, or a name on the Hub.

    Raises UsageError if the model or its tokenizer cannot be loaded.
    """
    towers = load_towers(Source("geneval", "clip", name, MODEL))
    towers.to(device, torch.float32)
    return ClipColors(towers)

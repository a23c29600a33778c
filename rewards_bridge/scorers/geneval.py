"""GenEval as a reward: does the image show the objects that the prompt asks for, with their counts, colours and places?

A detector finds the objects (mask2former.py), CLIP determines their colours where a verdict depends on them
(clip_colors.py), and GenEval's rule, shared with the shapes scorer, gives the verdict (rubric.py).

    scorer = load_scorer("geneval", {"detector": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"})
    scorer.score(images, prompts, metadata)

Source: Ghosh et al. 2023, "GenEval"; the soft and strict rules are those of UDM-GRPO's reward (arXiv 2604.18518).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from rewards_bridge.errors import PromptError
from rewards_bridge.scorers.base import Scores
from rewards_bridge.scorers.clip_colors import COLORS, load_colors
from rewards_bridge.scorers.geneval_metadata import Words, problems, read_metadata
from rewards_bridge.scorers.mask2former import ALIASES, CLASSES, choose_device, load_detector
from rewards_bridge.scorers.rubric import Detections, Verdict, details, judge, keep

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WORDS = Words("GenEval's judge", CLASSES, COLORS, TAGS, ALIASES)


class Detector(Protocol):
    """An object detector, such as mask2former.Mask2Former."""

    def detect(self, images: np.ndarray) -> Iterator[Mapping[str, Sequence[Mapping[str, Any]]]]:
        """Yield {class: [{"box", "score", "mask"}]} for each image of u8[B,H,W,3]."""
        ...


class ColorTeller(Protocol):
    """A classifier of objects' colours, such as clip_colors.ClipColors."""

    def tell(self, image: np.ndarray, box: Sequence[float], mask: np.ndarray, name: str) -> str:
        """Return the colour of the object of class `name` in an image u8[H,W,3]."""
        ...


class GenevalScorer:
    """Scores images by GenEval's metadata: score = soft, raw = strict, soft and official.

    detector: the benchmark uses the mmdetection checkpoint mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (a .pth or
    .safetensors file); a Hugging Face folder or Hub name of a Mask2Former for COCO instances also works, but other
    weights give other scores. clip: a folder or Hub name of CLIP ViT-L/14. device: auto, cpu, cuda or cuda:N. dtype: of
    the detector, float32, bfloat16 or float16; colours are always computed in float32. batch_size: images detected at
    once. any_size: also accept an mmdetection file whose sizes differ from those of the benchmark's detector.
    """

    def __init__(
        self,
        detector: str,
        clip: str = "openai/clip-vit-large-patch14",
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 8,
        any_size: bool = False,
    ) -> None:
        self.detector: Detector = load_detector(detector, device, dtype, batch_size, any_size)
        self.colors: ColorTeller = load_colors(clip, choose_device(device))

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]) -> Scores:
        """Score images u8[B,H,W,3] (RGB) against GenEval metadata; the prompts are only quoted in errors.

        Raises ValueError for images of another form and PromptError, which lists them all, for invalid metadata.
        """
        return score_images(self.detector, self.colors, images, prompts, metadata)

    def problem(self, prompt: str, metadata: dict) -> str:
        """Return why this prompt cannot be scored with its metadata; "" if it can."""
        return "; ".join(problems(metadata, WORDS))


def score_images(
    detector: Detector, colors: ColorTeller, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]
) -> Scores:
    """Score images as GenevalScorer.score does, with any detector and any classifier of colours."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"GenEval's judge expects images uint8[B, H, W, 3]; found {images.dtype}{list(images.shape)}")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"GenEval's judge expects one prompt and one metadata entry per image; "
            f"found {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata entries"
        )
    if wrong := check_metadata(prompts, metadata):
        text = "\n  ".join(wrong)
        raise PromptError(f"metadata that GenEval's judge cannot use; correct or remove these prompts:\n  {text}")
    judged = [
        _judge(colors, image, read_metadata(entry), detections)
        for image, entry, detections in zip(images, metadata, detector.detect(images), strict=True)
    ]
    verdicts = [verdict for verdict, _ in judged]
    raw = {
        "strict": np.array([verdict.strict for verdict in verdicts], dtype=np.float32),
        "soft": np.array([verdict.soft for verdict in verdicts], dtype=np.float32),
        "official": np.array([verdict.official for verdict in verdicts], dtype=np.float32),
    }
    return Scores(
        score=raw["soft"],
        raw=raw,
        reasons=["; ".join(verdict.reasons) for verdict in verdicts],
        details=[details(verdict, kept) for verdict, kept in judged],
    )


def _judge(
    colors: ColorTeller,
    image: np.ndarray,
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[Verdict, Detections]:
    kept = {
        name: [{**seen, "color": partial(colors.tell, image, seen["box"], seen["mask"], name)} for seen in objects]
        for name, objects in keep(metadata, detections).items()
    }
    return judge(metadata, kept), kept


def check_metadata(prompts: Sequence[str], metadata: Sequence[Any]) -> list[str]:
    """Return the problems of these prompts' GenEval metadata, one line each; empty if there are none.

    Needs no model, so a trainer can call it before it starts. Raises ValueError unless there is one entry per prompt.
    """
    if len(prompts) != len(metadata):
        raise ValueError(
            f"expected one metadata entry per prompt; found {len(prompts)} prompts, {len(metadata)} entries"
        )
    return [
        f"prompt {index} ({prompt!r}): {problem}"
        for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True))
        for problem in problems(entry, WORDS)
    ]

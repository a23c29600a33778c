"""GenEval as a reward: are the objects that the prompt asks for there, as often, in the colour and place it asks for?

A detector finds the objects (mask2former.py), CLIP tells their colours where a verdict depends on them
(clip_colors.py), and the rule that both judges of this package share gives the verdict (rubric.py).

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
    """What finds objects; mask2former.Mask2Former is one."""

    def detect(self, images: np.ndarray) -> Iterator[Mapping[str, Sequence[Mapping[str, Any]]]]:
        """Yield of each image u8[B,H,W,3] {class: [{"box", "score", "mask"}]}."""
        ...


class ColorTeller(Protocol):
    """What tells an object's colour; clip_colors.ClipColors is one."""

    def tell(self, image: np.ndarray, box: Sequence[float], mask: np.ndarray, name: str) -> str:
        """Return the colour of the object of class `name` in an image u8[H,W,3]."""
        ...


class GenevalScorer:
    """Scores images by GenEval's metadata: score = soft, raw = strict, soft and official.

    detector: the benchmark's own is the mmdetection checkpoint mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (a .pth or
    .safetensors file); a Hugging Face folder or Hub name of a Mask2Former for COCO instances works too, and other
    weights give other scores. clip: a folder or Hub name of CLIP ViT-L/14. device: auto, cpu, cuda or cuda:N. dtype:
    float32, bfloat16 or float16, of the detector; colours are told in float32. batch_size: images detected at once.
    any_size: take an mmdetection file whose sizes are not those of the benchmark's detector, too.
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
        """Judge images u8[B,H,W,3] (RGB) against GenEval metadata; the prompts' own text is only quoted in errors.

        Raises ValueError for images of another form, PromptError for metadata that cannot be judged, naming them all.
        """
        return score_images(self.detector, self.colors, images, prompts, metadata)

    def problem(self, prompt: str, metadata: dict) -> str:
        """Return what keeps this prompt from being judged by its metadata; "" if nothing does."""
        return "; ".join(problems(metadata, WORDS))


def score_images(
    detector: Detector, colors: ColorTeller, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict]
) -> Scores:
    """Judge images as GenevalScorer.score does, with any detector and any teller of colours."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"GenEval's judge wants images uint8[B, H, W, 3]; found {images.dtype}{list(images.shape)}")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"GenEval's judge wants one prompt and one metadata entry an image; "
            f"found {len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata entries"
        )
    if wrong := check_metadata(prompts, metadata):
        text = "\n  ".join(wrong)
        raise PromptError(f"metadata that GenEval's judge cannot use; correct or remove these prompts:\n  {text}")
    judged = [
        _judge(colors, image, read_metadata(entry), found)
        for image, entry, found in zip(images, metadata, detector.detect(images), strict=True)
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
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tuple[Verdict, Detections]:
    kept = {
        name: [{**seen, "color": partial(colors.tell, image, seen["box"], seen["mask"], name)} for seen in detections]
        for name, detections in keep(metadata, found).items()
    }
    return judge(metadata, kept), kept


def check_metadata(prompts: Sequence[str], metadata: Sequence[Any]) -> list[str]:
    """Return what keeps these prompts from being judged by their GenEval metadata, a line each; empty if nothing does.

    It needs no model: a trainer can ask before it starts. Raises ValueError if there is not one entry a prompt.
    """
    if len(prompts) != len(metadata):
        raise ValueError(f"wanted one metadata entry a prompt; found {len(prompts)} prompts, {len(metadata)} entries")
    return [
        f"prompt {index} ({prompt!r}): {problem}"
        for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True))
        for problem in problems(entry, WORDS)
    ]

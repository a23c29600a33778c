"""GenEval as a reward: are the objects that the prompt asks for there, as often, in the colour and place it asks for?

A detector finds the objects (mask2former.py), CLIP tells their colours where a verdict depends on them
(clip_colors.py), and the rule that both judges of this package share gives the verdict (rubric.py).

    scorer = load_scorer("geneval", {"detector": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"})
    scorer.score(images, prompts, metadata)

Source: Ghosh et al. 2023, "GenEval"; the soft and strict rules are those of UDM-GRPO's reward (SPEC 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers.base import Scores
from rewards_bridge.scorers.clip_colors import COLORS, load_colors
from rewards_bridge.scorers.mask2former import ALIASES, CLASSES, choose_device, load_detector
from rewards_bridge.scorers.rubric import Detections, Verdict, details, judge, keep

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


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

        Raises ValueError for images of another form, UsageError for metadata that cannot be judged, naming them all.
        """
        return score_images(self.detector, self.colors, images, prompts, metadata)

    def problem(self, prompt: str, metadata: dict) -> str:
        """What keeps this prompt from being judged by its metadata; "" if nothing does."""
        return "; ".join(_problems(metadata))


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
    problems = check_metadata(prompts, metadata)
    if problems:
        text = "\n  ".join(problems)
        raise UsageError(f"metadata that GenEval's judge cannot use; mend or remove these prompts:\n  {text}")
    judged = [
        _judge(colors, image, entry, found)
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
    """What keeps these prompts from being judged by their GenEval metadata, a line each; empty if nothing does.

    It needs no model: a trainer can ask before it starts. Raises ValueError if there is not one entry a prompt.
    """
    if len(prompts) != len(metadata):
        raise ValueError(f"wanted one metadata entry a prompt; found {len(prompts)} prompts, {len(metadata)} entries")
    return [
        f"prompt {index} ({prompt!r}): {problem}"
        for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True))
        for problem in _problems(entry)
    ]


def _problems(entry: Any) -> list[str]:
    if not isinstance(entry, Mapping):
        return [f"its metadata are a {type(entry).__name__}, wanted GenEval's keys 'tag' and 'include'"]
    problems = []
    if entry.get("tag") not in TAGS:
        problems.append(f"its tag is {entry.get('tag')!r}, wanted one of {', '.join(TAGS)}")
    for key in ("include", "exclude"):
        clauses = entry.get(key, [])
        if not isinstance(clauses, list | tuple) or not all(isinstance(clause, Mapping) for clause in clauses):
            problems.append(f"{key!r} is {clauses!r}, wanted a list of clauses {{'class': ..., 'count': ...}}")
            continue
        problems += [problem for clause in clauses for problem in _clause_problems(clause)]
    if not problems:
        try:
            judge(entry, {})  # the rule says itself what it needs
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    return problems


def _clause_problems(clause: Mapping[str, Any]) -> Iterator[str]:
    name, count, color = clause.get("class"), clause.get("count"), clause.get("color")
    if name not in CLASSES:
        instead = f"; GenEval calls it {ALIASES[name]!r}" if isinstance(name, str) and name in ALIASES else ""
        yield f"unknown class {name!r}, wanted one of COCO's 80{instead}"
    if not isinstance(count, int):
        yield f"the count of {name!r} is {count!r}, wanted a whole number"
    if color is not None and color not in COLORS:
        yield f"unknown color {color!r}, wanted one of {', '.join(COLORS)}"

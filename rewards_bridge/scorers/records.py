"""The built-in scorers, one record each: what the bridge knows of a scorer before it imports it.

To contribute a scorer, add a file beside this one and a record. A user's own scorer, "module:Class", needs no record.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_CLIP = ("torch", "transformers", "safetensors", "skimage", "torchvision", "timm", "open_clip")
"""skimage provides the photographs of examples.py."""
_EXAMPLES = "rewards_bridge.examples"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
DETECTOR_URL = (
    f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{DETECTOR}/{DETECTOR}_20220504_001756-743b7d99.pth"
)


def _no_hint(_options: Mapping[str, str]) -> list[str]:
    return []


@dataclass(frozen=True)
class ScorerRecord:
    """What is known of a scorer before it is imported."""

    target: str
    """module:Class, imported when the scorer is used."""
    packages: tuple[str, ...]
    """The modules that it imports besides numpy; the doctor tests whether they import."""
    memory_gib: float
    """Device memory in GiB for one process with the published weights in float32 and the default batch_size.

    An estimate from the number of parameters (4 bytes each: CLIP ViT-L/14 428 M, ViT-H/14 986 M, Swin-S Mask2Former
    69 M) and the largest activations, with 1 GiB for CUDA; half of it in 16 bits.
    """
    example: str
    """module:function -> examples.Example: the test images and their expected results."""
    hint: Callable[[Mapping[str, str]], list[str]] = _no_hint
    """Options -> lines that say how to get the files they name, where the scorer's own error does not."""


def _geneval_hint(options: Mapping[str, str]) -> list[str]:
    file = options.get("detector", f"{DETECTOR}.pth")
    advice = "" if "detector" in options else f" ; and add --option detector={file}"
    return [f"  fix: {shlex.join(['curl', '-fL', '--create-dirs', '-o', file, DETECTOR_URL])}{advice}"]


def _ocr_hint(options: Mapping[str, str]) -> list[str]:
    folder = str(Path(options.get("detection", "ocr-models/PP-OCRv5_mobile_det")).parent)
    flags = [f"--option {key}={folder}/PP-OCRv5_mobile_{key[:3]}" for key in ("detection", "recognition")]
    advice = "" if "detection" in options else f" ; and add {' '.join(flags)}"
    return [f"  fix: python -m rewards_bridge.scorers.ocr_models --output {shlex.quote(folder)}{advice}"]


def _vlm_hint(_options: Mapping[str, str]) -> list[str]:
    return ["  fix: start an endpoint and add --option url=http://HOST:PORT/v1 --option model=NAME"]


_ORDER = f"{_EXAMPLES}:each_prefers_its_own_prompt"

SCORERS: dict[str, ScorerRecord] = {
    "aesthetic": ScorerRecord(
        "rewards_bridge.scorers.aesthetic:AestheticScorer", _CLIP, 3.0, f"{_EXAMPLES}:ordinary_marks"
    ),
    "clipscore": ScorerRecord("rewards_bridge.scorers.clipscore:ClipScoreScorer", _CLIP, 3.0, _ORDER),
    "geneval": ScorerRecord(
        "rewards_bridge.scorers.geneval:GenevalScorer",
        _CLIP,
        8.0,
        f"{_EXAMPLES}:finds_what_is_there",
        _geneval_hint,
    ),
    "hpsv2": ScorerRecord("rewards_bridge.scorers.hpsv2:HpsV2Scorer", _CLIP, 6.0, _ORDER),
    # It needs an environment of its own; its own error lists the packages.
    "imagereward": ScorerRecord("rewards_bridge.scorers.imagereward:ImageRewardScorer", (), 4.0, _ORDER),
    "jpeg": ScorerRecord("rewards_bridge.scorers.jpeg:JpegScorer", ("PIL",), 0.5, f"{_EXAMPLES}:compresses_well"),
    "ocr": ScorerRecord(
        "rewards_bridge.scorers.ocr:OcrScorer",
        ("paddleocr", "onnxruntime", "rapidfuzz"),
        1.5,
        f"{_EXAMPLES}:reads_a_word",
        _ocr_hint,
    ),
    "pickscore": ScorerRecord("rewards_bridge.scorers.pickscore:PickScoreScorer", _CLIP, 6.0, _ORDER),
    "shapes": ScorerRecord(
        "rewards_bridge.scorers.shapes:ShapesScorer", ("skimage", "scipy"), 0.5, f"{_EXAMPLES}:sees_a_red_circle"
    ),
    "vlm": ScorerRecord(
        "rewards_bridge.scorers.vlm:VlmScorer", ("PIL",), 0.5, f"{_EXAMPLES}:answers_with_a_number", _vlm_hint
    ),
}
"""The scorers by name."""

"""Is a scorer ready? Its packages, its weights, its device, and a picture with a known answer."""

from __future__ import annotations

import importlib
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from rewards_bridge.errors import UsageError
from rewards_bridge.scorers import KNOWN, Scorer, load_scorer, with_device
from rewards_bridge.scorers.torchvision_ops import declare_operators

_REQUIREMENTS = Path(__file__).parent / "requirements.txt"
_TORCH = ("torch", "transformers", "safetensors", "skimage")  # the last for the photographs of examples.py
_CLIP = (*_TORCH, "torchvision", "timm", "open_clip")

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aesthetic": _CLIP,
    "clipscore": _CLIP,
    "geneval": _CLIP,
    "hpsv2": _CLIP,
    "imagereward": (),  # an environment of its own, which its own error spells out
    "jpeg": ("PIL",),
    "ocr": ("paddleocr", "onnxruntime", "rapidfuzz"),
    "pickscore": _CLIP,
    "shapes": ("skimage", "scipy"),
    "vlm": ("PIL",),
}
"""Scorer -> the modules it imports beside numpy."""
DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch", "skimage": "scikit-image"}
"""Module -> what pip calls it, where that differs."""
HINTS = {
    "geneval": "the benchmark's detector: wget https://download.openmmlab.com/mmdetection/v2.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth ; and give --option detector=FILE",
    "ocr": "model folders: python -m rewards_bridge.scorers.ocr_models --output FOLDER ; and give "
    "--option detection=FOLDER/PP-OCRv5_mobile_det --option recognition=FOLDER/PP-OCRv5_mobile_rec",
    "vlm": "a running endpoint: give --option url=http://HOST:PORT/v1 --option model=NAME",
}
"""Scorer -> what mends a load that failed, where its own error cannot know."""


def examine(name: str, options: Mapping[str, str], device: str | None = None) -> tuple[bool, list[str]]:
    """(whether the scorer is ready, a line for every step up to the first that fails, each failure with its remedy)."""
    lines: list[str] = []
    missing = missing_packages(name)
    if missing:
        pins = [pin(module) for module in missing]
        command = shlex.join([sys.executable, "-m", "pip", "install", *pins])
        return False, [f"packages: {', '.join(missing)} cannot be imported", f"  mend it: {command}"]
    lines.append("packages: all there")
    try:
        options = with_device(name, options, device)
        scorer = load_scorer(name, options)
    except Exception as error:  # of any library underneath
        said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        hint = [f"  mend it: {HINTS[name]}"] if name in HINTS else []
        return False, [*lines, f"weights: {said}", *hint]
    lines += ["weights: loaded", *_room(options.get("device", "cpu"))]
    try:
        right, said = check_example(name, scorer)
    except Exception as error:
        return False, [*lines, f"test images: {type(error).__name__}: {error}"]
    advice = [] if right else ["  fix: these are other weights, or another version of a package, than it is made for"]
    return right, [*lines, f"test images: {said}", *advice]


def check_example(name: str, scorer: Scorer) -> tuple[bool, str]:
    """Return (whether the scorer judges its test images as it has to, in words); raises whatever the scorer raises."""
    from rewards_bridge.examples import example  # draws with Pillow, which not every scorer needs

    try:
        known = example(name)
    except ImportError as error:
        return False, f"not there ({error}); fix: {sys.executable} -m pip install {pin('skimage')}"
    if known is None:
        return True, "none for a scorer of your own"
    scores = known.score(scorer)
    marks = ", ".join(f"{mark:.4g}" for mark in scores.score.tolist())
    if known.is_right(scores):
        return True, f"as expected ({known.expected}); scores {marks}"
    raw = {key: [round(float(value), 4) for value in values] for key, values in scores.raw.items()}
    return False, f"expected that {known.expected}; the scores are {marks}, raw {raw}"


def missing_packages(name: str) -> list[str]:
    """The scorer's modules that this interpreter cannot import."""
    missing = []
    for module in PACKAGES.get(name, ()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if module == "torchvision":
                    declare_operators()
                importlib.import_module(module)
        except Exception:  # a package that is there and broken is as good as missing
            missing.append(module)
    return missing


def pin(module: str) -> str:
    """The pinned requirement of a module."""
    wanted = DISTRIBUTIONS.get(module, module)
    for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.split("==")[0].lower() == wanted.lower():
            return requirement
    return wanted


def _room(device: str) -> Iterator[str]:
    """What is free on a CUDA device once the weights are on it."""
    if not device.startswith("cuda"):
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    yield f"device: {device} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free with the weights loaded"


def report(names: list[str], options: Mapping[str, str], device: str | None = None) -> int:
    """Examine these scorers (all known ones if none is named) and print what was found; 0 if all are ready, else 1.

    device: of those that take one, unless the options name it. Raises UsageError for options without exactly one
    scorer that they are for.
    """
    if options and len(names) != 1:
        raise UsageError("options are for one scorer: name it with --scorer, or leave the options out")
    ready = True
    for name in names or sorted(KNOWN):
        fine, lines = examine(name, options, device)
        ready = ready and fine
        print("\n".join([f"{name}: {'ready' if fine else 'not ready'}", *(f"  {line}" for line in lines)]), flush=True)
    return 0 if ready else 1

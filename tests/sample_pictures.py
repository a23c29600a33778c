"""Folders of pictures for the tests that score them: shapes that are known to be right or wrong."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from udm_grpo.worlds.shapes import TAGS, all_prompts
from udm_grpo.worlds.shapes_scenes import Scene, render, scene_for

BLANK = render(Scene(ground=230.0, shapes=()))


def two_of_each_tag() -> list[dict]:
    """Return twelve prompts of the shapes world, as GenEval's metadata."""
    by_tag = [[prompt for prompt in all_prompts() if prompt["tag"] == tag] for tag in TAGS]
    return [prompt for prompts in by_tag for prompt in (prompts[0], prompts[-1])]


def write_geneval(root: Path, prompts: list[dict], pictures: list[list[np.ndarray]], name: str = "04d") -> None:
    """Write pictures in GenEval's layout."""
    for number, (prompt, images) in enumerate(zip(prompts, pictures, strict=True)):
        samples = root / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
        for image, pixels in enumerate(images):
            Image.fromarray(pixels).save(samples / f"{image:{name}}.png")


def write_flat(root: Path, prompts: list[dict], pictures: list[list[np.ndarray]]) -> None:
    """Write pictures in the flat layout."""
    root.mkdir(parents=True)
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    for number, images in enumerate(pictures):
        for image, pixels in enumerate(images):
            Image.fromarray(pixels).save(root / f"{number:05d}_{image}.png")


def right_or_blank(prompts: list[dict], right: np.ndarray, seed: int = 0) -> list[list[np.ndarray]]:
    """Return pictures that show their prompts where `right` bool[P, G] is True, and blank ones elsewhere."""
    rng = np.random.default_rng(seed)
    return [
        [render(scene_for(prompt, rng)) if good else BLANK for good in row]
        for prompt, row in zip(prompts, right.tolist(), strict=True)
    ]


def numbered(prompts: int, images: int, size: int = 8) -> tuple[list[dict], list[list[np.ndarray]]]:
    """Return prompts numbered in their metadata, and pictures whose first two bytes are prompt and image numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (prompts, images, size, size, 3), np.uint8)
    pixels[:, :, 0, 0, 0] = np.arange(prompts)[:, None]
    pixels[:, :, 0, 0, 1] = np.arange(images)
    metadata = [{"tag": "untagged", "prompt": f"prompt {prompt}", "number": prompt} for prompt in range(prompts)]
    return metadata, [list(row) for row in pixels]

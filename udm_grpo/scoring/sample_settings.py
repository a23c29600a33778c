"""Settings that determine the pictures of a folder, and the check that drawing continues with the same ones."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from udm_grpo.data.prompts import PromptSet
from udm_grpo.files.atomic import replace_file
from udm_grpo.models import SamplingError, read_json
from udm_grpo.released.weights import ReleasedModel
from udm_grpo.reporting.metrics import write_json

NEW_SETTINGS = {"negative_prompt": ""}
"""Settings that settings.json of an earlier version lacks, with the values that it used."""


@dataclass(frozen=True)
class Settings:
    """Everything that determines the pictures of a folder, as in settings.json; drawing continues only with the same.

    weights: SHA-256 of the model. prompts: SHA-256 of the prompts and their metadata. steps: T. guidance_scale: g,
    1 is CFG-free. guidance_trunc: guidance applies while t_k is below it. height, width: pixels. text_length: L in
    tokens. dtype: of the transformer; pictures are decoded in float32, as in training. negative_prompt: what guidance
    contrasts with; "" is the empty prompt.
    """

    weights: str
    prompts: str
    images_per_prompt: int
    steps: int
    guidance_scale: float
    guidance_trunc: float
    seed: int
    height: int
    width: int
    text_length: int
    dtype: str
    layout: str
    negative_prompt: str = ""


def digest_of(released: ReleasedModel) -> str:
    """Return the SHA-256 of all that a model draws with: the same for a run's checkpoint and its export."""
    digest = hashlib.sha256(repr(sorted(released.files.items())).encode())
    for leaf in jax.tree.leaves([released.transformer, released.vq, released.path_codebook]):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def open_output(settings: Settings, source: dict[str, Any], prompts: PromptSet, output: Path) -> None:
    """Create the folder, or check that drawing can continue in it, and write everything in it but the pictures.

    Raises SamplingError for a folder with different settings (naming each) or with other contents.
    """
    file = output / "settings.json"
    if file.exists():
        there = read_json(file)
        now = asdict(settings)
        lines = [
            f"{name}: there {there.get(name)!r}, now {now[name]!r}"
            for name in now
            if there.get(name, NEW_SETTINGS.get(name)) != now[name]
        ]
        if lines:
            lines.append("Restore these to continue there, or give another folder as --output.")
            raise SamplingError("\n  ".join([f"{output} has pictures with different settings:", *lines]))
    # Names that start with a dot are leftovers of files that were being written when a process was killed.
    elif output.exists() and any(not entry.name.startswith(".") for entry in output.iterdir()):
        raise SamplingError(f"{output} is not empty and has no settings.json; give an empty or new folder as --output.")
    else:
        write_json(file, {**asdict(settings), "source": source})
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in prompts.metadata]
    texts = {output / f"{prompt:05d}" / "metadata.jsonl": row for prompt, row in enumerate(rows)}
    for path, text in texts.items() if settings.layout == "geneval" else [(output / "prompts.jsonl", "".join(rows))]:
        if not path.exists():
            replace_file(path, partial(Path.write_text, data=text, encoding="utf-8"))

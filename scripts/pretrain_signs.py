"""Pre-train the base model of the signs world from scratch: image tokenizer, image tokens, transformer.

    python -m scripts.pretrain_signs --output outputs/pretrain_signs
    python -m scripts.pretrain_signs --output outputs/pretrain_signs --install   # and put it into udm_grpo/assets

The fonts that udm_grpo/worlds/signs.py names are required. The run is seeded. Every stage writes its result to
--output; a killed run resumes after the last one, with the same final result. The base is imperfect on purpose, so that
RL has mistakes to correct: training is short, and one caption in ten is wrong in one digit.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, pre_tokenizers

from rewards_bridge.redaction import guarded
from udm_grpo.released.weights import Scheduler
from udm_grpo.worlds import base_checkpoint, signs
from udm_grpo.worlds.base_checkpoint import Metadata, World, command_line, vq_config

PATH = Scheduler(alpha=0.9, c=20.0, eps=1e-5, shift=1.0)
"""As in the shapes world, with a larger c for twice as many codes on a sphere of the same dimension."""

WORD_SPLITTER = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex('[0-9"]'), "isolated")]
)
"""Every digit and quote is a word of its own, so that unseen texts consist of tokens seen in training."""


@dataclass(frozen=True)
class Plan(base_checkpoint.Plan):
    """The length of each stage, where it differs from the shapes world."""

    tokenizer_batch: int = 16
    """Half of the shapes world's: an image has twice the pixels, so an update costs the same."""
    quantized_updates: int = 1_250
    """Half of the shapes world's: well before that, OCR reads the reconstructions without a mistake."""
    tokenizer_decay: int = 2_500
    updates: int = 500
    """Transformer updates; more of them would leave RL few mistakes to correct."""


def varied_pictures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return images u8[count,32,64,3] for the tokenizer."""
    prompts = signs.sample_prompts(signs.train_prompts(), count, rng, signs.PRETRAIN_TAG_WEIGHTS)
    return pictures(prompts, rng)


def sample(count: int, rng: np.random.Generator) -> list[Metadata]:
    """Return training prompts for the transformer."""
    return signs.sample_prompts(signs.train_prompts(), count, rng, signs.PRETRAIN_TAG_WEIGHTS)


def pictures(prompts: Sequence[Metadata], rng: np.random.Generator) -> np.ndarray:
    """Return an image of each prompt, u8[B,32,64,3]."""
    return signs.render_batch([signs.sign_for(metadata, rng) for metadata in prompts])


WORLD = World(
    name="signs",
    train=signs.train_prompts(),
    heldout=signs.heldout_prompts(),
    varied_pictures=varied_pictures,
    sample=sample,
    pictures=pictures,
    corrupt=signs.corrupt_caption,
    word_splitter=WORD_SPLITTER,
    vq_config=vq_config(codes=512, width_of_a_code=8),
    path=PATH,
)


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Run the command line; return the exit status."""
    return command_line(WORLD, plan or Plan(), argv)


if __name__ == "__main__":
    sys.exit(guarded(main))

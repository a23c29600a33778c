"""Make the base checkpoint of the signs world from nothing: tokenizer, image tokens, transformer.

    python -m scripts.pretrain_signs --output outputs/pretrain_signs
    python -m scripts.pretrain_signs --output outputs/pretrain_signs --install   # and put it into udm_grpo/assets

Needs the fonts that udm_grpo/worlds/signs.py names. Seeded; every stage leaves its result in --output and a killed run
resumes from the last one, to the same end. The base is meant to be imperfect in an honest way: short training, and one
caption in ten is wrong in one digit.
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
"""As in the shapes world, with a larger c for twice the codes on a sphere of as many dimensions."""

WORD_SPLITTER = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex('[0-9"]'), "isolated")]
)
"""Digits and quotes are words of their own, so that a text that was never seen is made of tokens that were."""


@dataclass(frozen=True)
class Plan(base_checkpoint.Plan):
    """How long each stage takes, where that is not as in the shapes world."""

    tokenizer_batch: int = 16
    """Half of the shapes world's, since a picture has twice its pixels: an update costs the same."""
    quantized_updates: int = 1_250
    """Half of the shapes world's: the reader has long read the reconstructions without a mistake."""
    tokenizer_decay: int = 2_500
    updates: int = 500
    """Transformer updates; with more of them the base would leave RL few mistakes to correct."""


def varied_pictures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures u8[count,32,64,3] for the tokenizer."""
    prompts = signs.sample_prompts(signs.train_prompts(), count, rng, signs.PRETRAIN_TAG_WEIGHTS)
    return pictures(prompts, rng)


def sample(count: int, rng: np.random.Generator) -> list[Metadata]:
    """Training prompts for the transformer."""
    return signs.sample_prompts(signs.train_prompts(), count, rng, signs.PRETRAIN_TAG_WEIGHTS)


def pictures(prompts: Sequence[Metadata], rng: np.random.Generator) -> np.ndarray:
    """Return a picture of each prompt: u8[B,32,64,3]."""
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

"""Pre-train the base model of the shapes world from scratch: image tokenizer, image tokens, transformer.

    python -m scripts.pretrain_shapes --output outputs/pretrain_shapes
    python -m scripts.pretrain_shapes --output outputs/pretrain_shapes --install   # and put it into udm_grpo/assets

The run is seeded. Every stage writes its result to --output; a killed run resumes after the last one, with the same
final result. The base is imperfect on purpose, so that RL has mistakes to correct: training is short, and one caption
in ten is wrong in one element (another class, colour, count or relation).
"""

import sys
from collections.abc import Sequence

import numpy as np
from tokenizers import pre_tokenizers

from rewards_bridge.redaction import guarded
from udm_grpo.released.weights import Scheduler
from udm_grpo.worlds import shapes
from udm_grpo.worlds.base_checkpoint import Metadata, Plan, World, command_line, vq_config
from udm_grpo.worlds.shapes_scenes import render_batch, scene_for

TAG_WEIGHTS = {"position": 3, "counting": 3, "color_attr": 5, "colors": 4, "two_object": 2, "single_object": 1}
"""How often the transformer sees each tag: most often those with the most prompts and the most distinctions."""
PATH = Scheduler(alpha=0.9, c=15.0, eps=1e-5, shift=1.0)
"""256 codes on a sphere in 8 dimensions have near neighbours, so c is large: a token keeps its code with probability
0.2 at t = 0.5, 0.7 at t = 0.8, 0.96 at t = 0.9. With (0.9, 3) it would be 0.3 at t = 0.9, and most of an image would be
decided in the last of ten steps, every token independently."""


def varied_pictures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return images u8[count,32,32,3] for the tokenizer: every tag, shapes placed anywhere."""
    prompts = shapes.sample_prompts(shapes.train_prompts(), count, rng, shapes.PRETRAIN_TAG_WEIGHTS)
    return render_batch([scene_for(metadata, rng) for metadata in prompts])


def sample(count: int, rng: np.random.Generator) -> list[Metadata]:
    """Return training prompts for the transformer."""
    return shapes.sample_prompts(shapes.train_prompts(), count, rng, TAG_WEIGHTS)


def pictures(prompts: Sequence[Metadata], rng: np.random.Generator) -> np.ndarray:
    """Return images u8[B,32,32,3] for the transformer: shapes at their usual places."""
    return render_batch([scene_for(metadata, rng, "anchored") for metadata in prompts])


WORLD = World(
    name="shapes",
    train=shapes.train_prompts(),
    heldout=shapes.heldout_prompts(),
    varied_pictures=varied_pictures,
    sample=sample,
    pictures=pictures,
    corrupt=shapes.corrupt_caption,
    word_splitter=pre_tokenizers.WhitespaceSplit(),
    vq_config=vq_config(codes=256, width_of_a_code=8),
    path=PATH,
)


def main(argv: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Run the command line; return the exit status."""
    return command_line(WORLD, plan or Plan(), argv)


if __name__ == "__main__":
    sys.exit(guarded(main))

"""The built-in default: train a tiny URSA on the shapes world, on 2 CPU cores, without any download.

    python -m udm_grpo.train --config configs/shapes.py
    python -m udm_grpo.train --config configs/shapes.py:smoke      # the same, cut down to a few small iterations

Base: udm_grpo/assets/ursa-shapes (0.86 M parameters, 16 image tokens of 256 codes, 32x32 pixels), pre-trained by
scripts/pretrain_shapes.py. Scorer: rewards_bridge/scorers/shapes.py, GenEval's rule on segmented shapes, in a process
of its own. Held-out prompts are combinations that neither pre-training nor training has seen.
"""

from pathlib import Path

from udm_grpo.config import RunConfig

ASSETS = Path(__file__).resolve().parent.parent / "udm_grpo" / "assets"


def get_config(variant: str = "") -> RunConfig:
    """Return the configuration; the variant "smoke" runs a few small iterations."""
    config = RunConfig(output_dir="outputs/shapes", iterations=350)
    config.model.path = str(ASSETS / "ursa-shapes")
    config.model.logit_rows = 128
    config.prompts.train = str(ASSETS / "shapes-prompts" / "train.jsonl")
    config.prompts.heldout = str(ASSETS / "shapes-prompts" / "heldout.jsonl")
    config.prompts.tag_weights = {  # tags with more combinations are drawn more often
        "color_attr": 8,
        "position": 5,
        "counting": 3,
        "colors": 2,
        "two_object": 1,
        "single_object": 1,
    }
    config.rollout.prompts = 16
    config.rollout.group_size = 8
    config.rollout.micro_batch = 64
    config.grpo.window_starts = 7
    config.grpo.kl_weight = 0.1
    config.optimizer.learning_rate = 4e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_updates = 10
    config.optimizer.micro_batch = 128
    config.evaluation.steps = (10, 25)
    config.evaluation.every = 50
    config.evaluation.picture_every = 50
    config.evaluation.prompts = 48
    config.evaluation.final_prompts = 93  # all of them
    config.evaluation.batch = 128
    config.checkpoint.every = 50
    if variant == "smoke":
        _cut_down(config)
    elif variant:
        raise ValueError(f"configs/shapes.py has no variant {variant!r}; it has smoke.")
    return config


def _cut_down(config: RunConfig) -> None:
    """Reduce the run to a few small iterations: everything runs, nothing is learned."""
    config.output_dir = "outputs/shapes-smoke"
    config.iterations = 4
    config.rollout.prompts = 4
    config.rollout.group_size = 4
    config.rollout.micro_batch = 8
    config.rollout.steps = 10
    config.optimizer.micro_batch = 16
    config.optimizer.warmup_updates = 1
    config.evaluation.steps = (10,)
    config.evaluation.every = 2
    config.evaluation.picture_every = 2
    config.evaluation.prompts = 6
    config.evaluation.final_prompts = 12
    config.evaluation.images_per_prompt = 2
    config.evaluation.batch = 8  # the rollout's micro-batch, so that both share one program
    config.evaluation.picture_prompts = 8
    config.checkpoint.every = 2

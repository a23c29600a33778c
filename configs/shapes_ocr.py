"""Train a tiny URSA to write numbers, with a real OCR model (PaddleOCR) as the scorer, on 2 CPU cores.

    python -m rewards_bridge.scorers.ocr_models --output outputs/ocr-models     # the OCR model's weights, once
    python -m udm_grpo.train --config configs/shapes_ocr.py
    python -m udm_grpo.train --config configs/shapes_ocr.py:smoke               # the same, cut down

Base: udm_grpo/assets/ursa-signs (0.9 M parameters, 32 image tokens of 512 codes, 32x64 pixels), pre-trained by
scripts/pretrain_signs.py. Scorer: rewards_bridge/scorers/ocr.py in two processes, by the published rule, except that
additional text counts as errors. Held-out prompts ask for numbers that neither pre-training nor training has seen.
"""

from pathlib import Path

from udm_grpo.config import RunConfig, ScorerConfig

ASSETS = Path(__file__).resolve().parent.parent / "udm_grpo" / "assets"
MODELS = "outputs/ocr-models"


def get_config(variant: str = "") -> RunConfig:
    """Return the configuration; the variant "smoke" runs a few small iterations."""
    config = RunConfig(output_dir="outputs/shapes-ocr", iterations=100)
    config.model.path = str(ASSETS / "ursa-signs")
    config.model.height, config.model.width = 32, 64
    config.model.logit_rows = 128
    config.prompts.train = str(ASSETS / "signs-prompts" / "train.jsonl")
    config.prompts.heldout = str(ASSETS / "signs-prompts" / "heldout.jsonl")
    config.prompts.tag_weights = {"three": 6, "two": 3, "one": 1}  # longer texts are harder
    config.rewards.scorers = {
        "ocr": ScorerConfig(
            replicas=2,
            options={
                "detection": f"{MODELS}/PP-OCRv5_mobile_det",
                "recognition": f"{MODELS}/PP-OCRv5_mobile_rec",
                "extra": "counts",  # the published rule would accept "17" for "7"
                "enlarge": "96",  # reads rendered signs without a mistake, in 0.6 of the time of 224
            },
        )
    }
    config.rollout.prompts = 16
    config.rollout.group_size = 8
    config.rollout.micro_batch = 64
    config.grpo.window_starts = 7
    config.grpo.kl_weight = 0.1
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_updates = 10
    config.optimizer.micro_batch = 128
    config.evaluation.steps = (10, 25)
    config.evaluation.every = 50
    config.evaluation.picture_every = 50
    config.evaluation.prompts = 66
    config.evaluation.final_prompts = 222  # all of them
    config.evaluation.images_per_prompt = 2
    config.evaluation.batch = 128
    config.checkpoint.every = 25
    if variant == "smoke":
        _cut_down(config)
    elif variant:
        raise ValueError(f"configs/shapes_ocr.py has no variant {variant!r}; it has smoke.")
    return config


def _cut_down(config: RunConfig) -> None:
    """Reduce the run to two small iterations: everything runs, nothing is learned."""
    config.output_dir = "outputs/shapes-ocr-smoke"
    config.iterations = 2
    config.rewards.scorers["ocr"].replicas = 1
    config.rollout.prompts = 2
    config.rollout.group_size = 4
    config.rollout.micro_batch = 8
    config.optimizer.micro_batch = 8
    config.optimizer.warmup_updates = 1
    config.evaluation.steps = (10,)
    config.evaluation.every = 0
    config.evaluation.picture_every = 1
    config.evaluation.final_prompts = 6
    config.evaluation.images_per_prompt = 1
    config.evaluation.batch = 8
    config.evaluation.picture_prompts = 6

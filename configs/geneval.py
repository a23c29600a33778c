"""UDM-GRPO on GenEval: objects, counts, colours and places. Published: GenEval 0.69 -> 0.96.

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    hf download openai/clip-vit-large-patch14 --local-dir models/clip-vit-large-patch14
    curl -fLO https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl
    python -m scripts.prepare_prompts generate-geneval --leave-out evaluation_metadata.jsonl --output data/geneval

    python -m udm_grpo.train --config configs/geneval.py --compile_only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/geneval.py
    python -m udm_grpo.train --config configs/geneval.py --config.checkpoint.resume=latest

Weights, in models/: the checkpoint above; GenEval's own detector, the mmdetection file
mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth of the OpenMMLab model zoo; CLIP ViT-L/14 for colours.
`python -m rewards_bridge doctor` says what is missing and the command that gets it.

Prompts, in data/geneval: the command above draws 50,000 training prompts from GenEval's grammar (the split train)
that ask for nothing that the benchmark's 553 ask for (the split test). The release's own training prompts,
dataset/geneval/train_metadata.jsonl of https://github.com/yifan123/flow_grpo, take their place with

    python -m scripts.prepare_prompts geneval --train train_metadata.jsonl --test evaluation_metadata.jsonl \\
        --output data/geneval

Training draws the tags in the published ratio (prompts.tag_weights), whatever their numbers in the set. With
--config.model.path=..., --config.prompts.train=..., --config.prompts.heldout=... and
--config.rewards.scorers.geneval.options.detector=... files may lie anywhere.

Hardware: TPU slices (configs/compile_table.md) or GPUs. Images: 16 prompts x 8 = 128 an iteration, 384 training
states; rollout.micro_batch and optimizer.micro_batch are 32 over all devices, so 2 images a device on 16, 4 on 8.
Memory a device, of the update, which needs most: 8.3 of 15.75 GiB on v5e:4x4, 8.8 of 31.25 on v6e:4x4, 8.9 of 95.74
on v5p:2x2x4, 14.3 of 95.74 on v5p:2x2x2, 12.4 of 94.75 on tpu7x:2x2x1; by the TPU compiler. What the other
programs need, and the largest micro-batches: configs/compile_table.md. On NVIDIA GPUs add
--config.model.attention=cudnn; without --topology, --compile_only compiles for the GPUs at hand.

Scorer: in a process of its own, by the trainer, on the first GPU it sees, or on CPU where there is none, as beside a
TPU. On GPUs that JAX fills, leave it room with XLA_PYTHON_CLIENT_MEM_FRACTION=0.85; or start
`python -m rewards_bridge serve` on other machines and name them:
--config.rewards.scorers.geneval.addresses=host:port with tls_ca and token_file.

Evaluation: 25 steps, no guidance, all 553 prompts x 4 images at the start and the end.
Measured here: what configs/compile_table.md says, by the compiler alone. Not tried: the released
weights, a GPU, a TPU, this run.
Source: UDM-GRPO, arXiv 2604.18518, and its public configs/geneval_grpo/ursa_1.7b_ibq512.yaml.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig
from udm_grpo.host import geneval_prompts


def get_config() -> RunConfig:
    """The configuration."""
    config = published("geneval", group_size=8)
    config.prompts.train = "data/geneval:train"
    config.prompts.heldout = "data/geneval:test"
    config.prompts.tag_weights = dict(geneval_prompts.RATIO)
    detector = "models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
    options = {"detector": detector, "clip": "models/clip-vit-large-patch14"}
    config.rewards.scorers = {"geneval": ScorerConfig(options=options)}
    config.evaluation.final_prompts = 553
    config.evaluation.images_per_prompt = 4
    return config

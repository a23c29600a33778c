"""UDM-GRPO on GenEval: objects, counts, colours and positions. Published result: GenEval 0.69 -> 0.96.

Files. Each command stores its files where this recipe reads them:

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    hf download openai/clip-vit-large-patch14 --local-dir models/clip-vit-large-patch14
    curl -fL --create-dirs -o models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth \\
        https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth
    curl -fL --create-dirs -o downloads/evaluation_metadata.jsonl \\
        https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl
    python -m scripts.prepare_prompts generate-geneval --leave-out downloads/evaluation_metadata.jsonl \\
        --output data/geneval

Check the installation and the files, compute the memory needs, train, and resume after an interruption:

    python -m rewards_bridge doctor --config configs/geneval.py
    python -m udm_grpo.train --config configs/geneval.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/geneval.py
    python -m udm_grpo.train --config configs/geneval.py --config.checkpoint.resume=latest

Scores of the base and of the trained model:

    python -m udm_grpo.sample --checkpoint models/URSA-1.7B-IBQ512 --dtype bfloat16 --prompts data/geneval:test \\
        --output outputs/geneval-before
    python -m udm_grpo.sample --run outputs/geneval --prompts data/geneval:test \\
        --output outputs/geneval-after
    python -m udm_grpo.evaluate --samples outputs/geneval-after --compare outputs/geneval-before \\
        --output outputs/geneval-scores --config configs/geneval.py

Weights: the base model; GenEval's own detector (Mask2Former Swin-S of mmdetection 2.x); CLIP ViT-L/14 for colours, for
which options.clip also accepts the open_clip folder that the public release uses:

    hf download timm/vit_large_patch14_clip_224.openai --local-dir models/vit_large_patch14_clip_224.openai
    python -m udm_grpo.train --config configs/geneval.py \\
        --config.rewards.scorers.geneval.options.clip=models/vit_large_patch14_clip_224.openai

Prompts: the command above draws 50,000 training prompts from GenEval's grammar (the split train), none of which asks
for the same as one of the benchmark's 553 prompts (the split test). Training draws their tags in the published ratio
(prompts.tag_weights), regardless of their numbers in the set. The release's own training prompts, train_metadata.jsonl
in its raw_rl_data/geneval, are prepared by

    curl -fL --create-dirs -o downloads/train_metadata.jsonl \\
        https://raw.githubusercontent.com/Yovecent/UDM-GRPO/main/raw_rl_data/geneval/train_metadata.jsonl
    python -m scripts.prepare_prompts geneval --train downloads/train_metadata.jsonl \\
        --test downloads/evaluation_metadata.jsonl --output data/geneval

Hardware: a TPU slice or NVIDIA GPUs; the published runs used 32 A100-40GB. Both micro-batches of 32 are over all
devices, and are padded if the number of devices does not divide them. At its start a run compiles its programs and
takes what fits the memory of its devices: compute copies of policy and reference on every device, so that nothing but
gradients is exchanged, else sharded ones, and as little recomputation as possible; --compile-only says what that is
for other devices, or without --topology for the available ones. The least that an update needs (sharded copies, whole
blocks recomputed, plain attention; configs/compile_table.md) is 8.3 of 15.75 GiB on v5e:4x4, 8.8 of 31.25 on
v6e:4x4, 8.9 of 95.74 on v5p:2x2x4, 14.3 of 95.74 on v5p:2x2x2 and 12.4 of 94.75 on tpu7x:2x2x1. On v5p:2x2x4 a run
takes 46.2 GiB (whole copies, nothing recomputed, splash), on v5e:4x4 11.9 GiB (sharded copies, all but matrix products
recomputed).
On NVIDIA GPUs the least, with cuDNN's attention and by JAX's CUDA compiler (--topology h100:8), is 10.7 GiB per device
on 8 H100, and 31.9 GiB on 7, a number that divides neither the embedding nor the head; 8 H100 have room for whole
copies and no recomputation (45.7 GiB). One GPU recomputes nothing with --config.optimizer.micro_batch=0, as many states
at a time as fit (4 on an H100, 12 on an H200), and with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, since JAX takes 0.75 of
its memory by default.

Scorer: devices is auto: a process on the last GPU, which the trainer does not use (of 8 GPUs, 7 train), or on the CPU
of a machine with one GPU or none, such as the host of a TPU; the start of a run prints which. More GPUs, with a process
on each: --config.rewards.scorers.geneval.devices=6,7. On a GPU that also trains:
--config.rewards.scorers.geneval.devices=shared with --config.rewards.trainer_memory_fraction=0.85. On other
machines, by `python -m rewards_bridge serve`: --config.rewards.scorers.geneval.addresses=host:port with tls_ca and
token_file.

Time: 15 PFLOP an iteration (128 images), by udm_grpo/compile_check/flops.py. At 40 % of the peak of 8 H100 that
is 5 s an iteration and 13 hours for 10,000 of them, without scoring and evaluations: an estimate, not a measurement.
Disk: the weights above, 32 GB for each checkpoint (float32 weights and two moments, the bfloat16 reference), of which
three are on disk while one is being saved, and 9 GB for the export at the end: 105 GB in output_dir, whose free space
is checked at the start and before each save. --config.lora.rank needs less, since it saves an adapter only.

Evaluation: 25 steps, no guidance, all 553 prompts x 4 images at the start and the end.

Measured: the memory figures, by the compiler alone. Not tested: the released weights, a GPU, a TPU, this run.
Source: UDM-GRPO, arXiv 2604.18518, and configs/geneval_grpo/ursa_1.7b_ibq512.yaml of its public release.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig
from udm_grpo.data import geneval_prompts


def get_config() -> RunConfig:
    """Return the configuration."""
    config = published("geneval", group_size=8)
    config.prompts.train = "data/geneval:train"
    config.prompts.heldout = "data/geneval:test"
    config.prompts.tag_weights = dict(geneval_prompts.RATIO)
    detector = "models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
    options = {"detector": detector, "clip": "models/clip-vit-large-patch14"}
    config.rewards.scorers = {"geneval": ScorerConfig(options=options, devices=("auto",))}
    config.evaluation.final_prompts = 553
    config.evaluation.images_per_prompt = 4
    return config

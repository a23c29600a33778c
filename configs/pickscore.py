"""UDM-GRPO on PickScore, a model of human preference. Published result: PickScore 20.46 -> 23.81.

Files. Each command stores its files where this recipe reads them:

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    hf download yuvalkirstain/PickScore_v1 --local-dir models/PickScore_v1
    curl -fL --create-dirs -o downloads/pickscore/train.txt \\
        https://raw.githubusercontent.com/Yovecent/UDM-GRPO/main/raw_rl_data/pickscore/train.txt
    curl -fL --create-dirs -o downloads/pickscore/test.txt \\
        https://raw.githubusercontent.com/Yovecent/UDM-GRPO/main/raw_rl_data/pickscore/test.txt
    python -m scripts.prepare_prompts prompts --train downloads/pickscore/train.txt \\
        --test downloads/pickscore/test.txt --output data/pickscore

Check the installation and the files, compute the memory needs, train, and resume after an interruption:

    python -m rewards_bridge doctor --config configs/pickscore.py
    python -m udm_grpo.train --config configs/pickscore.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/pickscore.py
    python -m udm_grpo.train --config configs/pickscore.py --config.checkpoint.resume=latest

Scores of the base and of the trained model:

    python -m udm_grpo.sample --checkpoint models/URSA-1.7B-IBQ512 --dtype bfloat16 --prompts data/pickscore:test \\
        --images-per-prompt 1 --output outputs/pickscore-before
    python -m udm_grpo.sample --run outputs/pickscore --prompts data/pickscore:test --images-per-prompt 1 \\
        --output outputs/pickscore-after
    python -m udm_grpo.evaluate --samples outputs/pickscore-after --compare outputs/pickscore-before \\
        --output outputs/pickscore-scores --config configs/pickscore.py

Weights: the base model, and PickScore's CLIP ViT-H/14. Prompts: 25,432 for training and 2,048 for testing, one a line.

Hardware: a TPU slice or NVIDIA GPUs; the published runs used 32 A100-40GB. Both micro-batches of 32 are over all
devices, and are padded if the number of devices does not divide them. At its start a run compiles its programs and
takes what fits the memory of its devices: compute copies of policy and reference on every device, so that nothing but
gradients is exchanged, else sharded ones, and as little recomputation as possible; --compile-only says what that is
for other devices, or without --topology for the available ones. The least that an update needs (sharded copies, whole
blocks recomputed, plain attention; configs/compile_table.md) is 8.3 of 15.75 GiB on v5e:4x4, 8.8 of 31.25 on
v6e:4x4, 8.9 of 95.74 on v5p:2x2x4, 14.3 of 95.74 on v5p:2x2x2 and 12.4 of 94.75 on tpu7x:2x2x1. On v5p:2x2x4 a run
takes 46.2 GiB (whole copies, nothing recomputed, splash), on v5e:4x4 11.9 GiB (sharded copies, all but matrix products
recomputed). These are
of configs/geneval.py, whose programs differ only in the number of images.
On NVIDIA GPUs the least, with cuDNN's attention and by JAX's CUDA compiler (--topology h100:8), is 10.7 GiB per device
on 8 H100, and 31.9 GiB on 7, a number that divides neither the embedding nor the head; 8 H100 have room for whole
copies and no recomputation (45.7 GiB). One GPU recomputes nothing with --config.optimizer.micro_batch=0, as many states
at a time as fit (4 on an H100, 12 on an H200), and with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, since JAX takes 0.75 of
its memory by default.

Scorer: devices is auto: a process on the last GPU, which the trainer does not use (of 8 GPUs, 7 train), or on the CPU
of a machine with one GPU or none; the start of a run prints which. A CPU is slow for 256 images an iteration: with a
TPU, start `python -m rewards_bridge serve` on a machine with a GPU and set
--config.rewards.scorers.pickscore.addresses=host:port with tls_ca and token_file. More GPUs, with a process on each:
--config.rewards.scorers.pickscore.devices=6,7. On a GPU that also trains:
--config.rewards.scorers.pickscore.devices=shared with --config.rewards.trainer_memory_fraction=0.85.

Time: 30 PFLOP an iteration (256 images), by udm_grpo/compile_check/flops.py. At 40 % of the peak of 8 H100 that
is 10 s an iteration and 27 hours for 10,000 of them, without scoring and evaluations: an estimate, not a measurement.
Disk: the weights above, 32 GB for each checkpoint (float32 weights and two moments, the bfloat16 reference), of which
three are on disk while one is being saved, and 9 GB for the export at the end: 105 GB in output_dir, whose free space
is checked at the start and before each save. --config.lora.rank needs less, since it saves an adapter only.

Evaluation: 25 steps, no guidance, 2,048 prompts x 1 image at the start and the end.

Measured: the memory figures, by the compiler alone. Not tested: the released weights, a GPU, a TPU, this run.
Source: UDM-GRPO, arXiv 2604.18518, and configs/pickscore_grpo/ursa_1.7b_ibq512.yaml of its public release.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig


def get_config() -> RunConfig:
    """Return the configuration."""
    config = published("pickscore", group_size=16)
    config.prompts.train = "data/pickscore:train"
    config.prompts.heldout = "data/pickscore:test"
    config.rewards.scorers = {"pickscore": ScorerConfig(options={"model": "models/PickScore_v1"}, devices=("auto",))}
    config.evaluation.final_prompts = 2048
    config.evaluation.images_per_prompt = 1
    return config

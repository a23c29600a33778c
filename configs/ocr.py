"""UDM-GRPO on text in pictures, read by PaddleOCR. Published: OCR accuracy 0.08 -> 0.57.

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    python -m rewards_bridge.scorers.ocr_models --output models/ocr
    curl -fL --create-dirs -o ocr/train.txt \\
        https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/ocr/train.txt
    curl -fL --create-dirs -o ocr/test.txt \\
        https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/ocr/test.txt
    python -m scripts.prepare_prompts ocr --train ocr/train.txt --test ocr/test.txt --output data/ocr

    python -m udm_grpo.train --config configs/ocr.py --compile_only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/ocr.py
    python -m udm_grpo.train --config configs/ocr.py --config.checkpoint.resume=latest

Weights, in models/: the checkpoint, and the folders of a detection and a recognition model, which the second command
makes. Prompts, in data/ocr: about 20,000 to train on and about 1,000 to test on, each with the wanted text in double
quotes; the command above checks every line. With --config.model.path=..., --config.prompts.train=...,
--config.prompts.heldout=... and --config.rewards.scorers.ocr.options.detection=... (recognition likewise) they may lie
anywhere.

Hardware: TPU slices (configs/compile_table.md) or GPUs. Images: 16 prompts x 16 = 256 an iteration, 768 training
states; both micro-batches are 32 over all devices, so 2 images a device on 16, 4 on 8. Memory a device, of the update,
which needs most: 8.3 of 15.75 GiB on v5e:4x4, 8.8 of 31.25 on v6e:4x4, 8.9 of 95.74 on v5p:2x2x4, 14.3 of 95.74 on
v5p:2x2x2, 12.4 of 94.75 on tpu7x:2x2x1; by the TPU compiler. The programs are those of configs/geneval.py with more
turns of their loops, so its figures hold here, within the few MB that twice the token ids take. On NVIDIA GPUs add
--config.model.attention=cudnn.

Scorer: on CPU, 2 processes that share the images; more with --config.rewards.scorers.ocr.replicas=4.

Evaluation: 25 steps, no guidance, 1,000 prompts x 1 image at the start and the end.
Measured here: what configs/compile_table.md says (with 128 images), by the compiler alone. Not tried: the released
weights, a GPU, a TPU, this run. The release reads with an older PaddleOCR (2.9), so scores may differ a little.
Source: UDM-GRPO, arXiv 2604.18518, and its public configs/ocr_grpo/ursa_1.7b_ibq512.yaml.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig


def get_config() -> RunConfig:
    """The configuration."""
    config = published("ocr", group_size=16)
    config.prompts.train = "data/ocr:train"
    config.prompts.heldout = "data/ocr:test"
    folders = {"detection": "PP-OCRv5_mobile_det", "recognition": "PP-OCRv5_mobile_rec"}
    options = {name: f"models/ocr/{folder}" for name, folder in folders.items()}
    config.rewards.scorers = {"ocr": ScorerConfig(options=options, replicas=2)}
    config.evaluation.final_prompts = 1000
    config.evaluation.images_per_prompt = 1
    return config

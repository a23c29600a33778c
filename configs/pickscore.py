"""UDM-GRPO on PickScore: what people prefer. Published: PickScore 20.46 -> 23.81.

    hf download BAAI/URSA-1.7B-IBQ512 --local-dir models/URSA-1.7B-IBQ512
    hf download yuvalkirstain/PickScore_v1 --local-dir models/PickScore_v1
    curl -fL --create-dirs -o pick/train.txt \\
        https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/pickscore/train.txt
    curl -fL --create-dirs -o pick/test.txt \\
        https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset/pickscore/test.txt
    python -m scripts.prepare_prompts prompts --train pick/train.txt --test pick/test.txt --output data/pickscore

    python -m udm_grpo.train --config configs/pickscore.py --compile_only --topology v5p:2x2x4
    python -m udm_grpo.train --config configs/pickscore.py
    python -m udm_grpo.train --config configs/pickscore.py --config.checkpoint.resume=latest

Weights, in models/: the checkpoint, and the scorer's CLIP ViT-H/14. Prompts, in data/pickscore: 25,432
to train on and 2,048 to test on. With --config.model.path=..., --config.prompts.train=..., --config.prompts.heldout=...
and --config.rewards.scorers.pickscore.options.model=... they may lie anywhere.

Hardware: TPU slices (configs/compile_table.md) or GPUs. Images: 16 prompts x 16 = 256 an iteration, 768 training
states; both micro-batches are 32 over all devices, so 2 images a device on 16, 4 on 8. Memory a device, of the update,
which needs most: 8.3 of 15.75 GiB on v5e:4x4, 8.8 of 31.25 on v6e:4x4, 8.9 of 95.74 on v5p:2x2x4, 14.3 of 95.74 on
v5p:2x2x2, 12.4 of 94.75 on tpu7x:2x2x1; by the TPU compiler. The programs are those of configs/geneval.py with more
turns of their loops, so its figures hold here, within the few MB that twice the token ids take. On NVIDIA GPUs add
--config.model.attention=cudnn.

Scorer: in a process of its own, on CPU; options.device=cuda:0 puts it on a GPU, with
environment.CUDA_VISIBLE_DEVICES=7 on one that the trainer leaves alone, and addresses=host:port on another machine.

Evaluation: 25 steps, no guidance, 2,048 prompts x 1 image at the start and the end.
Measured here: what configs/compile_table.md says (with 128 images), by the compiler alone. Not tried: the released
weights, a GPU, a TPU, this run.
Source: UDM-GRPO, arXiv 2604.18518, and its public configs/pickscore_grpo/ursa_1.7b_ibq512.yaml.
"""

from configs.common import published
from udm_grpo.config import RunConfig, ScorerConfig


def get_config() -> RunConfig:
    """The configuration."""
    config = published("pickscore", group_size=16)
    config.prompts.train = "data/pickscore:train"
    config.prompts.heldout = "data/pickscore:test"
    config.rewards.scorers = {"pickscore": ScorerConfig(options={"model": "models/PickScore_v1"})}
    config.evaluation.final_prompts = 2048
    config.evaluation.images_per_prompt = 1
    return config

"""The settings that the published recipes share: URSA-1.7B-IBQ512 at 512x512, UDM-GRPO with its clean action, forward
trajectory, three early steps and no guidance. The recipes themselves are geneval.py, pickscore.py and ocr.py.

Published: 32 A100-40GB, 4 processes of 8, bf16 on float32 master weights, at most 10,000 iterations.
Source: UDM-GRPO, arXiv 2604.18518, and the configuration files of its public release.
"""

from udm_grpo.config import RunConfig


def published(name: str, group_size: int) -> RunConfig:
    """Return the recipe without its prompts, scorer and evaluation; `group_size` is G.

    Parameters, moments and gradients are sharded over all devices (mesh.fsdp), and both micro-batches of 32 give 16
    devices 2 images each. The start of a run chooses where the compute copies are (model.compute_weights) and what the
    backward pass recomputes (model.remat) by the memory of the devices. configs/compile_table.md lists what that is for
    several slices; --compile-only says it for any other.
    """
    config = RunConfig(output_dir=f"outputs/{name}", seed=1337, iterations=10_000)
    config.model.path = "models/URSA-1.7B-IBQ512"
    config.model.dtype = "bfloat16"
    config.model.text_length = 320
    config.model.height = config.model.width = 512
    config.model.logit_rows = 1
    config.rollout.prompts = 16
    config.rollout.group_size = group_size
    config.rollout.steps = 10
    config.rollout.micro_batch = 32
    config.grpo.trained_steps = 3
    config.grpo.window_starts = 3
    config.grpo.clip_range = 1e-4
    config.grpo.kl_weight = 0.05
    config.optimizer.learning_rate = 1e-6
    config.optimizer.beta1, config.optimizer.beta2 = 0.9, 0.95
    config.optimizer.weight_decay = 0.01
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.micro_batch = 32
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.evaluation.steps = (25,)
    config.evaluation.batch = 32
    config.checkpoint.every = 100
    return config

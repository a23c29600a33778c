"""The stages of the benchmark in plain PyTorch, on the same weights and inputs as ours."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import torch

from rewards_bridge.errors import UserError
from scripts import benchmark_torch as plain
from scripts.benchmark_stages import SAMPLER_ROWS, Arrays, Setting
from udm_grpo.diffusion.rollout import step_times


def model_of(setting: Setting, arrays: Arrays) -> plain.Transformer:
    """Return the policy as a PyTorch model."""
    network = setting.steps.plans.network
    params = plain.tensors(jax.device_get(arrays.policy))
    return plain.Transformer(params, asdict(network.config), network.grid, setting.sizes.text_length)


def learner_of(setting: Setting, arrays: Arrays) -> plain.Learner:
    """Return the PyTorch learner that takes the same update."""
    samples, sizes = arrays.samples, setting.steps.sizes
    objective, network = setting.steps.plans.objective, setting.steps.plans.network
    advantage = np.tile(np.asarray(objective.weights(arrays.score)).reshape(-1), sizes.states // sizes.images)
    states = {
        "prompt_ids": samples.prompt_ids,
        "noisy": samples.noisy,
        "action": samples.action,
        "ref_logp": samples.frozen["ref_logp"],
    }
    tensors = plain.tensors({name: np.asarray(value)[: sizes.states] for name, value in states.items()})
    tensors["advantage"] = torch.from_numpy(advantage.astype(np.float32))
    return plain.Learner(model_of(setting, arrays), setting.config, tensors, sizes.update, network.rows)


def torch_stages(setting: Setting, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the stages by name, without scoring, which is the same for both."""
    if jax.default_backend() != "cpu":
        raise UserError("--against torch compares on the CPU only; set JAX_PLATFORMS=cpu.")
    plans, m = setting.steps.plans, setting.steps.sizes.rollout
    model, learner = model_of(setting, arrays), learner_of(setting, arrays)
    codebook = torch.from_numpy(np.array(setting.path.codebook))
    tokenizer = plain.tensors(jax.device_get(arrays.tokenizer))
    prompts, clean = (plain.tensors(np.asarray(array)[:m]) for array in (arrays.prompt_ids, arrays.clean))
    of_steps, first = step_times(setting.path, plans.rollout), plans.rollout.first_step(setting.path)
    times = {name: value[first:] for name, value in of_steps.items()}
    middle = {name: float(value[plans.rollout.steps // 2]) for name, value in of_steps.items()}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SAMPLER_ROWS, len(codebook), generator=generator)
    z = torch.arange(SAMPLER_ROWS)
    side = (-1, *plans.network.grid)

    def sampler() -> Any:
        return plain.sample_step(codebook, logits, z, middle["level"], middle["rate"], middle["dt"], generator)

    def draw() -> Any:
        return plain.rollout(model, codebook, prompts, times, plans.network.rows, 0)

    def reference() -> Any:
        samples = learner.samples
        names = ("prompt_ids", "noisy", "action")
        chunks = zip(*(samples[name].split(learner.micro_batch) for name in names), strict=True)
        return [model.token_mean_logp(x, noisy, y, plans.network.rows) for x, noisy, y in chunks]

    inference = {
        "sampler": sampler,
        "forward": lambda: model.features(prompts, clean),
        "rollout": draw,
        "decode": lambda: plain.decode(tokenizer, clean.view(side)),
        "reference": reference,
    }
    runs: dict[str, Callable[[], Any]] = {name: plain.without_gradients(run) for name, run in inference.items()}

    def iteration() -> Any:
        for _ in range(0, setting.steps.sizes.images, m):
            with torch.inference_mode():
                plain.decode(tokenizer, draw().view(side))
        with torch.inference_mode():
            reference()
        return learner.step()

    return runs | {"update": learner.step, "iteration": iteration}

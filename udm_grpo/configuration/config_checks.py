"""Validate a configuration: report all invalid fields and combinations at once, with what to change."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from udm_grpo.config import ConfigError, RunConfig
from udm_grpo.configuration.config_fields import field_values
from udm_grpo.files import places
from udm_grpo.grpo.objective import objective_class
from udm_grpo.machine.gpu_split import device_problems
from udm_grpo.model import lora

MAX_NUMBER = 3.4028234663852886e38
"""The largest number of float32, in which a run computes."""


def _choice(problems: list[str], name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        problems.append(f"{name} is {value!r}; set it to one of {', '.join(allowed)}.")


def _at_least(problems: list[str], least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:  # NaN too
            problems.append(f"{name.replace('__', '.')} is {value}; set it to at least {least}.")


def _above_zero(problems: list[str], **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            problems.append(f"{name.replace('__', '.')} is {value}; set it above 0.")


def _fraction(problems: list[str], name: str, value: float) -> None:
    if not 0 <= value < 1:
        problems.append(f"{name} is {value}; set it to 0 (not set) or between 0 and 1.")


def _not_finite(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for each number, also in a tuple or dict, that is not finite or exceeds float32."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(f"{name}.{key}", part)
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _not_finite(f"{name}[{index}]", part)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # NaN too
        shown = "above 10^39" if isinstance(value, int) else str(value)  # Python refuses to print long integers
        yield name, f"{name} is {shown}; set it to a finite number that float32 can hold."


def _choices(config: RunConfig, problems: list[str]) -> None:
    _choice(problems, "model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _choice(problems, "model.attention", config.model.attention, ("auto", "xla", "cudnn", "splash"))
    _choice(problems, "model.remat", config.model.remat, ("auto", "none", "dots", "full"))
    _choice(problems, "model.compute_weights", config.model.compute_weights, ("auto", "replicated", "sharded"))
    try:
        objective_class(config.grpo.objective)
    except ConfigError as error:
        problems.append(str(error))
    _choice(problems, "grpo.trajectory", config.grpo.trajectory, ("forward", "rollout"))
    _choice(problems, "grpo.action", config.grpo.action, ("clean", "intermediate"))
    _choice(problems, "optimizer.schedule", config.optimizer.schedule, ("constant", "cosine", "multistep"))


def _ranges(config: RunConfig, problems: list[str]) -> None:
    rollout, grpo, optimizer, evaluation = config.rollout, config.grpo, config.optimizer, config.evaluation
    _at_least(problems, 1, iterations=config.iterations, rollout__prompts=rollout.prompts)
    _at_least(problems, 1, rollout__steps=rollout.steps)
    _at_least(problems, 0, rollout__micro_batch=rollout.micro_batch, optimizer__micro_batch=optimizer.micro_batch)
    _at_least(problems, 2, rollout__group_size=rollout.group_size)
    _at_least(problems, 1, grpo__trained_steps=grpo.trained_steps, grpo__window_starts=grpo.window_starts)
    _at_least(problems, 1, grpo__updates_per_rollout=grpo.updates_per_rollout, grpo__minibatches=grpo.minibatches)
    _at_least(problems, 1, model__logit_rows=config.model.logit_rows)
    _at_least(problems, 1, evaluation__prompts=evaluation.prompts, evaluation__final_prompts=evaluation.final_prompts)
    _at_least(problems, 1, evaluation__images_per_prompt=evaluation.images_per_prompt)
    _at_least(problems, 1, evaluation__batch=evaluation.batch, evaluation__picture_prompts=evaluation.picture_prompts)
    _at_least(problems, 0, evaluation__every=evaluation.every, evaluation__picture_every=evaluation.picture_every)
    _at_least(problems, 0, evaluation__extremes=evaluation.extremes)
    _at_least(problems, 0, checkpoint__every=config.checkpoint.every, model__text_length=config.model.text_length)
    _at_least(problems, 1, checkpoint__keep=config.checkpoint.keep)
    if not 0 <= config.checkpoint.stopped_status <= 125:
        problems.append(f"checkpoint.stopped_status is {config.checkpoint.stopped_status}; set it to 0 to 125.")
    _at_least(problems, 0, grpo__kl_weight=grpo.kl_weight, grpo__clip_range=grpo.clip_range)
    _at_least(problems, 0, optimizer__learning_rate=optimizer.learning_rate, rollout__shift=rollout.shift)
    _at_least(problems, 0, optimizer__warmup_updates=optimizer.warmup_updates)
    _at_least(problems, 0, optimizer__weight_decay=optimizer.weight_decay)
    _at_least(problems, 1, rollout__guidance_scale=rollout.guidance_scale)
    _at_least(problems, 1, model__height=config.model.height, model__width=config.model.width)
    if not 0 <= optimizer.ema_decay < 1:
        problems.append(f"optimizer.ema_decay is {optimizer.ema_decay}; set it to 0 (off) or between 0 and 1.")
    _at_least(problems, 1, optimizer__ema_every=optimizer.ema_every)
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if not 0 <= beta < 1:
            problems.append(f"optimizer.{name} is {beta}; set it to 0 or more and below 1.")
    _above_zero(problems, optimizer__max_grad_norm=optimizer.max_grad_norm, grpo__advantage_clip=grpo.advantage_clip)
    _at_least(problems, 0, distributed__processes=config.distributed.processes)
    _at_least(problems, 1, distributed__initialization_timeout_s=config.distributed.initialization_timeout_s)
    _at_least(problems, 1, distributed__silence_s=config.distributed.silence_s)
    if not evaluation.steps:
        problems.append("evaluation.steps is empty; name at least one number of rollout steps.")
    elif min(evaluation.steps) < 1:
        problems.append(f"evaluation.steps is {evaluation.steps}; set it to numbers of at least 1.")
    if not evaluation.guidance_scales or not all(scale >= 1 for scale in evaluation.guidance_scales):
        problems.append(
            f"evaluation.guidance_scales is {evaluation.guidance_scales}; set it to one or more numbers of at least 1."
        )


def _scorers(config: RunConfig, problems: list[str]) -> None:
    if not config.rewards.scorers:
        problems.append("rewards.scorers is empty; name at least one.")
    _fraction(problems, "rewards.trainer_memory_fraction", config.rewards.trainer_memory_fraction)
    problems += device_problems(config.rewards.scorers)
    for name, scorer in config.rewards.scorers.items():
        at = f"rewards__scorers__{name}__"
        _above_zero(problems, **{f"{at}deadline_s": scorer.deadline_s, f"{at}start_timeout_s": scorer.start_timeout_s})
        _at_least(problems, 0, **{f"{at}max_restarts": scorer.max_restarts})
        _at_least(problems, 1, **{f"{at}replicas": scorer.replicas})
        _fraction(problems, f"rewards.scorers.{name}.memory_fraction", scorer.memory_fraction)
        if not math.isfinite(scorer.weight):
            problems.append(f"rewards.scorers.{name}.weight is {scorer.weight}; set it to a finite number.")


def _combinations(config: RunConfig, problems: list[str]) -> None:
    rollout, grpo = config.rollout, config.grpo
    last = grpo.window_starts + grpo.trained_steps - 1
    if last > rollout.steps:
        problems.append(
            f"grpo.window_starts + grpo.trained_steps - 1 is {last}, past the rollout's {rollout.steps} steps; lower "
            "one of them or raise rollout.steps."
        )
    if config.model.attention == "cudnn" and config.model.dtype == "float32":
        problems.append(
            "model.attention is cudnn, which computes in bfloat16 only, and model.dtype is float32; set "
            "model.dtype=bfloat16 or model.attention=auto."
        )
    if config.model.compute_weights == "replicated" and config.mesh.tensor > 1:
        problems.append(
            f"model.compute_weights is replicated, but mesh.tensor={config.mesh.tensor} splits each layer; set "
            "model.compute_weights=auto or mesh.tensor=1."
        )
    images = rollout.prompts * rollout.group_size
    if grpo.minibatches >= 1 and images % grpo.minibatches:
        problems.append(
            f"grpo.minibatches is {grpo.minibatches}, which does not divide rollout.prompts x rollout.group_size = "
            f"{images} images; change one of them."
        )
    if config.optimizer.schedule == "multistep" and not config.optimizer.milestones:
        problems.append("optimizer.schedule is multistep without optimizer.milestones; name at least one.")
    _average(config, problems)
    if config.optimizer.milestones and config.optimizer.schedule != "multistep":
        problems.append(
            "optimizer.milestones takes effect only with optimizer.schedule=multistep; set that or remove it."
        )
    sizes = dataclasses.asdict(config.mesh)
    if sum(size == -1 for size in sizes.values()) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        problems.append(f"mesh is {sizes}; every size is at least 1, and at most one is -1 (the rest of the devices).")
    for name, value in (("model.path", config.model.path), ("prompts.train", config.prompts.train)):
        if not value:
            problems.append(f"{name} is empty; name a {'folder' if name == 'model.path' else 'file'}.")
    if not config.prompts.heldout:
        problems.append("prompts.heldout is empty; name a file or prepared folder of evaluation prompts.")
    if config.checkpoint.keep_best and not config.evaluation.every:
        problems.append("checkpoint.keep_best needs evaluations during training; set evaluation.every above 0.")


def _average(config: RunConfig, problems: list[str]) -> None:
    every, updates = config.optimizer.ema_every, config.iterations * config.grpo.optimizer_steps
    if every > 1 and not config.optimizer.ema_decay:
        problems.append(
            "optimizer.ema_every takes effect only with optimizer.ema_decay above 0; set that or remove it."
        )
    elif every > 1 and every > updates >= 1:
        problems.append(
            f"optimizer.ema_every is {every}, but the run has {updates} optimizer steps, so the average would remain "
            f"the start model; lower it to at most {updates}."
        )


def _lora(config: RunConfig, problems: list[str]) -> None:
    adapter = config.lora
    _at_least(problems, 0, lora__rank=adapter.rank)
    if not 0 < adapter.alpha < math.inf:
        problems.append(f"lora.alpha is {adapter.alpha}; set it to a finite number above 0.")
    try:
        lora.targets(adapter.targets)
    except ValueError as error:
        problems.append(f"lora.targets is {adapter.targets}: {error}.")


def validate(config: RunConfig) -> None:
    """Raise ConfigError listing every field or combination that cannot run."""
    problems: list[str] = []
    _choices(config, problems)
    _scorers(config, problems)
    _ranges(config, problems)
    _lora(config, problems)
    _combinations(config, problems)
    problems += places.config_problems(config)
    for name, problem in (pair for field in field_values(config) for pair in _not_finite(*field)):
        if not any(line.startswith(f"{name} is ") for line in problems):
            problems.append(problem)
    if problems:
        raise ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))

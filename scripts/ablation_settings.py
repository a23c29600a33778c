"""The settings that scripts/ablation.py compares: the published table, and Reduced-Step windows against all steps.

A setting is a few overrides of a base configuration. The computation of an iteration is counted in forward passes for
each image, where the gradient of a training state counts as three (the backward pass takes about two):

    passes = R + K + 3 K U           rollout, reference, update
    R = T - 1 + guided steps         T + guided steps if the rollout keeps its trajectory, which needs step 0, too
    K = grpo.trained_steps, U = grpo.updates_per_rollout

With more than one optimizer step per rollout, the log-probabilities of the policy that drew the images take K more.
Decoding, scoring and evaluations are not counted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from udm_grpo.config import RunConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.diffusion.rollout import RolloutPlan

GUIDANCE = 3.0
"""g of the settings that are trained with guidance."""
PUBLISHED = ("intermediate-rollout", "clean-rollout", "clean-forward", "clean-forward-free")
"""The rows of the published table in the order of their scores."""
METHOD, ALL_STEPS, EQUAL_COMPUTE = "clean-forward-free", "all-steps", "all-steps-equal-compute"


@dataclass(frozen=True)
class Setting:
    """A setting of the ablation."""

    description: str
    overrides: dict[str, str] = field(default_factory=dict)
    """Value by the dotted name of a field."""
    published: float | None = None
    """GenEval score of the 1.7B model in the published table (arXiv 2604.18518)."""
    like: str = ""
    """The setting whose learning rate it uses, since only the number of iterations differs; empty: its own."""


def configured(config: str, *overrides: Mapping[str, str]) -> RunConfig:
    """Return the configuration FILE[:variant] with overrides, of which later ones win; raise ConfigError."""
    result = parse([f"--config={config}", *words(*overrides)])
    validate(result)
    return result


def words(*overrides: Mapping[str, str]) -> list[str]:
    """Return overrides as a command line."""
    return [f"--config.{name}={value}" for part in overrides for name, value in part.items()]


def settings(config: str, base: Mapping[str, str]) -> dict[str, Setting]:
    """Return every setting by its name; `base`: the overrides of FILE[:variant] that all of them share.

    A setting that is trained with guidance is evaluated with guidance during training, and at the end also without.
    """
    guided = {"rollout.guidance_scale": f"{GUIDANCE:g}", "evaluation.guidance_scales": f"({GUIDANCE}, 1.0)"}
    free = {"rollout.guidance_scale": "1", "evaluation.guidance_scales": "(1.0,)"}
    clean, forward = {"grpo.action": "clean"}, {"grpo.trajectory": "forward"}
    intermediate, visited = {"grpo.action": "intermediate"}, {"grpo.trajectory": "rollout"}
    method = {**clean, **forward, **free}
    shared = configured(config, base, method)
    every = {**method, "grpo.trained_steps": str(shared.rollout.steps), "grpo.window_starts": "1"}
    windows = f"{shared.grpo.trained_steps} steps from one of the first"
    ratio = forward_passes(shared) / forward_passes(configured(config, base, every))
    fewer = {"iterations": str(max(1, round(shared.iterations * ratio)))}
    return {
        "intermediate-rollout": Setting(
            "intermediate action, rollout trajectory, with guidance", {**intermediate, **visited, **guided}, 0.84
        ),
        "clean-rollout": Setting(
            "clean action, rollout trajectory, with guidance", {**clean, **visited, **guided}, 0.89
        ),
        "clean-forward": Setting(
            "clean action, forward trajectory, with guidance", {**clean, **forward, **guided}, 0.94
        ),
        METHOD: Setting(
            f"clean action, forward trajectory, CFG-free; {windows} {shared.grpo.window_starts}", method, 0.96
        ),
        "early-windows": Setting(f"the same; {windows} 3, as published", {**method, "grpo.window_starts": "3"}),
        ALL_STEPS: Setting("the same; all steps, for as many optimizer steps", every),
        EQUAL_COMPUTE: Setting("the same; all steps, for as many forward passes", {**every, **fewer}, like=ALL_STEPS),
    }


def forward_passes(config: RunConfig) -> int:
    """Return the forward passes of an iteration for each image; see the module's docstring.

    The model's path is taken to be the metric path, on which step 0 of a rollout cannot change a token.
    """
    rollout, grpo = config.rollout, config.grpo
    plan = RolloutPlan(rollout.steps, _shift(config), rollout.guidance_scale, rollout.guidance_trunc)
    kept = grpo.trajectory == "rollout" or grpo.action == "intermediate"
    first = 0 if kept or rollout.steps == 1 else 1
    drawn = rollout.steps - first + int(plan.guided()[first:].sum())
    old = grpo.trained_steps if grpo.optimizer_steps > 1 else 0
    return drawn + grpo.trained_steps + old + 3 * grpo.trained_steps * grpo.updates_per_rollout


def _shift(config: RunConfig) -> float:
    file = Path(config.model.path) / "scheduler" / "scheduler_config.json"
    return config.rollout.shift or float(json.loads(file.read_text(encoding="utf-8"))["shift"])

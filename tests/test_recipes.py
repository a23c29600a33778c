"""The published recipes: they can run, they say what was published, and their pages hold commands that work."""

import re
import shlex
from pathlib import Path

import pytest

from configs import geneval, ocr, pickscore
from rewards_bridge.scorers import KNOWN
from udm_grpo import compile_only, train
from udm_grpo.command_line import parse
from udm_grpo.config_checks import validate

RECIPES = {"geneval": geneval, "pickscore": pickscore, "ocr": ocr}
GROUPS = {"geneval": (8, 553, 4), "pickscore": (16, 2048, 1), "ocr": (16, 1000, 1)}


def commands(name: str) -> list[str]:
    lines = (line.strip() for line in (RECIPES[name].__doc__ or "").splitlines())
    return [line for line in lines if line.startswith(("python -m ", "hf download "))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_was_published(name):
    config = RECIPES[name].get_config()
    validate(config)
    rollout, grpo, optimizer = config.rollout, config.grpo, config.optimizer
    evaluation = config.evaluation
    group, final_prompts, images = GROUPS[name]
    assert (rollout.prompts, rollout.group_size, rollout.steps, rollout.guidance_scale) == (16, group, 10, 1.0)
    assert (grpo.trained_steps, grpo.window_starts, grpo.trajectory, grpo.action) == (3, 3, "forward", "clean")
    assert (grpo.clip_range, grpo.kl_weight, grpo.advantage_clip) == (1e-4, 0.05, 5.0)
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.weight_decay) == (1e-6, "constant", 0.01)
    assert (optimizer.beta1, optimizer.beta2, optimizer.max_grad_norm) == (0.9, 0.95, 1.0)
    model = config.model
    assert (model.dtype, model.height, model.width, model.text_length) == ("bfloat16", 512, 512, 320)
    assert (evaluation.steps, evaluation.final_prompts, evaluation.images_per_prompt) == ((25,), final_prompts, images)
    assert list(config.rewards.scorers) == [name]
    assert name in KNOWN


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_of_a_page_can_be_given(name):
    found = commands(name)
    assert len(found) >= 4
    for command in found:
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "udm_grpo.train"]:
            given = compile_only.options(words[3:])
            assert parse(given.rest).output_dir == f"outputs/{name}"
            assert given.topology == ("v5p:2x2x4" if "--compile_only" in words else "")
    named = re.findall(r"--config\.([\w.]+)=", RECIPES[name].__doc__ or "")
    for field in named:
        parse(["--config", f"configs/{name}.py", f"--config.{field}={'1' if field.endswith('replicas') else 'x'}"])


def test_the_readme_names_the_command_of_the_page():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    compiling = [command for command in commands("geneval") if "--compile_only" in command]
    assert len(compiling) == 1
    assert f"\n{compiling[0]}\n" in readme


def test_missing_weights_are_an_error_that_names_the_folder(tmp_path, capsys):
    """Before prompts are read and a scorer is started."""
    assert train.main(["--config", "configs/geneval.py", f"--config.output_dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert "models/URSA-1.7B-IBQ512: no such folder" in said
    assert not (tmp_path / "run").exists()

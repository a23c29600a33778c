"""The published recipes have the published settings, and their pages prepare the prompts that they read."""

import re
import shlex
from collections import Counter

import pytest
from pages import manual, recipe_commands

from configs import geneval, ocr, pickscore
from rewards_bridge.scorers import SCORERS
from scripts import prepare_prompts
from udm_grpo import train
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_checks import validate
from udm_grpo.data.prompts import read_prompts

RECIPES = {"geneval": geneval, "pickscore": pickscore, "ocr": ocr}
GROUPS = {"geneval": (8, 553, 4), "pickscore": (16, 2048, 1), "ocr": (16, 1000, 1)}


def page(name: str) -> str:
    """Return the page of a recipe, with each command on one line."""
    return (RECIPES[name].__doc__ or "").replace("\\\n", " ")


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
    assert name in SCORERS


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_that_a_page_names_is_one(name):
    """test_rehearsal_recipes.py runs the commands."""
    named = re.findall(r"--config\.([\w.]+)=", RECIPES[name].__doc__ or "")
    for field in named:
        parse(
            [
                "--config",
                f"configs/{name}.py",
                f"--config.{field}={'1' if field.endswith(('replicas', 'fraction', 'micro_batch')) else 'x'}",
            ]
        )


RAW = {
    "downloads/evaluation_metadata.jsonl": '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": '
    '[{"class": "cat", "count": 3}], "prompt": "a photo of two cats"}\n',
    "downloads/train_metadata.jsonl": "".join(
        f'{{"tag": "{tag}", "include": [{{"class": "dog", "count": 1}}], "prompt": "a photo of a {tag} dog"}}\n'
        for tag in ("position", "counting", "color_attr", "colors", "two_object", "single_object")
    ),
    "downloads/ocr/train.txt": 'A sign that says "Stop"\nA shirt with "Hi"\n',
    "downloads/ocr/test.txt": 'A cake with "Happy 40"\n',
    "downloads/pickscore/train.txt": "a dog\na cat\n",
    "downloads/pickscore/test.txt": "a bird\n",
}
"""A few lines of each file that the pages tell users to download."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_prompts_that_a_page_prepares_lie_where_the_recipe_reads(name, tmp_path, monkeypatch):
    downloaded = set(re.findall(r"curl -fL --create-dirs -o +(downloads/\S+)", page(name)))
    assert downloaded
    assert downloaded <= set(RAW)
    for file, text in RAW.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    config = RECIPES[name].get_config()
    with pytest.raises(FileNotFoundError, match=rf"no folder data/{name} .*scripts\.prepare_prompts"):
        read_prompts(config.prompts.train)
    preparing = re.findall(r"python -m scripts\.prepare_prompts (.*)", page(name))
    assert preparing
    for command in preparing:
        assert prepare_prompts.main(shlex.split(command) + ["--count=90"] * command.startswith("generate")) == 0
        train = read_prompts(config.prompts.train, config.prompts.tag_weights or None)
        assert len(read_prompts(config.prompts.heldout)) == 1
        drawn = Counter(train.tags[i] for i in train.batch(0, 17, 0)[2])
        if name == "geneval":
            assert drawn == {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


def test_the_readme_names_the_command_of_the_page():
    readme = manual()
    compiling = [command for command in recipe_commands("geneval") if "--compile-only" in command]
    assert len(compiling) == 1
    assert f"\n{compiling[0]}\n" in readme


def test_missing_weights_are_an_error_that_names_the_folder(tmp_path, capsys):
    """The error comes before prompts are read and a scorer is started."""
    assert train.main(["--config", "configs/geneval.py", f"--config.output_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "models/URSA-1.7B-IBQ512: no such folder" in said
    assert not (tmp_path / "run").exists()

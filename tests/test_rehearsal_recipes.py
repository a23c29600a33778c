"""Each published recipe from its downloads to its scores, by the commands of its page and of the README."""

import json
from pathlib import Path

import pytest
from pages import RECIPES
from rehearsal import Stage, play_page, stage

pytestmark = pytest.mark.timeout(1800)
FULL = (
    "--config.output_dir=outputs/full --config.iterations=1 --config.rollout.prompts=1 --config.rollout.group_size=2"
    " --config.rollout.micro_batch=2 --config.optimizer.micro_batch=2 --config.evaluation.final_prompts=1"
    " --config.evaluation.batch=2 --config.evaluation.picture_prompts=1"
)
"""The least that a whole run takes at the published 512x512 pixels."""


@pytest.fixture
def user(tmp_path: Path):
    with stage(tmp_path) as made:
        made.quick = True
        yield made


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_its_pages_say(name: str, user: Stage) -> None:
    play_page(user, name)
    outputs = user.folder / "outputs"
    summary = json.loads((outputs / name / "summary.json").read_text())
    assert summary["iterations"] == 2
    scores = json.loads((outputs / f"{name}-scores" / "summary.json").read_text())
    assert scores["scorers"].keys() == {name}

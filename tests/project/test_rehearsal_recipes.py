"""Each published recipe runs from its downloads to its scores, by the commands of its page and of the README."""

import json
from pathlib import Path

import pytest
from pages import RECIPES
from rehearsal import Stage, play_page, stage

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def user(tmp_path: Path):
    with stage(tmp_path) as opened:
        opened.quick = True
        yield opened


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_as_its_pages_say(name: str, user: Stage) -> None:
    play_page(user, name)
    outputs = user.folder / "outputs"
    summary = json.loads((outputs / name / "summary.json").read_text())
    assert summary["iterations"] == 2
    scores = json.loads((outputs / f"{name}-scores" / "summary.json").read_text())
    assert scores["scorers"].keys() == {name}

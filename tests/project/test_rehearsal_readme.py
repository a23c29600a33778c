"""The README's commands run in the order of the page, except those of the published recipes."""

import json
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from rehearsal import Stage, play_page, stage

from rewards_bridge.client import BridgeConfig, RewardsClient
from udm_grpo.worlds.shapes import all_prompts
from udm_grpo.worlds.shapes_scenes import render, scene_for

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("readme")) as opened:
        yield opened


@pytest.fixture(scope="module")
def said(user: Stage) -> dict[str, str]:
    """The standard output of each command."""
    return play_page(user, "README")


def of(said: dict[str, str], *parts: str) -> str:
    """Return the output of the one command that contains all these parts."""
    (output,) = (text for command, text in said.items() if all(part in command for part in parts))
    return output


def summary(user: Stage, folder: str) -> dict:
    return json.loads((user.folder / "outputs" / folder / "summary.json").read_text())


def test_trainings_come_to_their_end(said: dict[str, str], user: Stage) -> None:
    """These are the README's first command, a resumed run, several processes, an adapter, and a reward by OCR."""
    assert summary(user, "shapes")["iterations"] == 2
    assert set(summary(user, "shapes")["by_steps"]) == {"10", "25"}
    assert summary(user, "together")["iterations"] == 1
    assert (user.folder / "outputs" / "lora" / "export_lora" / "adapter_model.safetensors").exists()
    signs = summary(user, "shapes-ocr")
    assert signs["base"]["ocr"] >= signs["base"]["exact"] > 0.1
    assert set(signs["final"]["tags"]) == {"one", "two", "three"}


def test_reports_of_one_run_and_of_two(said: dict[str, str], user: Stage) -> None:
    assert "<title>shapes</title>" in (user.folder / "outputs" / "shapes" / "report.html").read_text()
    assert "<title>2 runs: shapes, other</title>" in (user.folder / "comparison.html").read_text()


def test_pictures_and_their_scores(said: dict[str, str], user: Stage) -> None:
    pictures = user.folder / "outputs" / "pictures"
    assert len(list(pictures.glob("*/samples/*.png"))) == 8
    assert (pictures / "contact_sheet.png").exists()
    scores = summary(user, "scores")
    assert (scores["images"], scores["prompts"]) == (8, 2)
    assert 0.5 < scores["scorers"]["jpeg"]["values"]["jpeg_kilobytes"]["mean"]["value"] < 3


def test_a_released_model_is_described_and_compared(said: dict[str, str]) -> None:
    described = of(said, "udm_grpo.convert info udm_grpo/assets/ursa-shapes")
    assert "alpha: 0.9\n" in described
    assert "parameters: 857728\n" in described
    assert of(said, "udm_grpo.convert verify", "--forward").endswith("\nequal\n")


def test_a_scorer_by_itself(said: dict[str, str]) -> None:
    answer = json.loads(of(said, "rewards_bridge score --scorer shapes"))
    assert answer["scorer"] == "shapes"
    assert answer["raw"]["strict"] == 1.0


def test_a_server_by_itself(said: dict[str, str]) -> None:
    address = of(said, "rewards_bridge serve --scorer shapes").split()[-1]
    metadata = all_prompts()[0]
    picture = render(scene_for(metadata, np.random.default_rng(0)))
    with RewardsClient(BridgeConfig(address=address, start_timeout_s=60)) as client:
        scores = client.submit(picture[None], [metadata["prompt"]], [metadata]).result()
    assert scores.raw["strict"][0] == 1.0


def test_the_demo_page_is_served(said: dict[str, str]) -> None:
    """tests/scripts/test_demo.py tests the page itself."""
    address = next(word for word in of(said, "scripts.demo").split() if word.startswith("http"))
    with urllib.request.urlopen(address, timeout=60) as page:
        assert b"gradio" in page.read()

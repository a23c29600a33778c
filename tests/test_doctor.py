"""What the doctor says of scorers that are ready and of such that lack something."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rewards_bridge import doctor
from rewards_bridge.__main__ import main
from rewards_bridge.examples import example
from rewards_bridge.scorers import KNOWN
from rewards_bridge.scorers.base import Scores
from rewards_bridge.server import ServeConfig, _ready_scorer


def test_every_known_scorer_has_its_packages_and_its_picture():
    assert set(doctor.PACKAGES) == set(KNOWN)
    for name in KNOWN:
        found = example(name)
        assert found is not None
        assert found.image.dtype == np.uint8
        assert found.image.shape[2] == 3
    assert example("mine:Own") is None


@pytest.mark.parametrize("name", ["shapes", "jpeg"])
def test_a_scorer_that_needs_no_weights_is_ready(name, capsys):
    assert main(["doctor", "--scorer", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ready\n")
    assert "picture: as expected" in said


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    monkeypatch.setitem(doctor.PACKAGES, "jpeg", ("PIL", "no_such_module"))
    monkeypatch.setitem(sys.modules, "PIL", None)  # import then raises ImportError
    assert main(["doctor", "--scorer", "jpeg"]) == 1
    said = capsys.readouterr().out
    assert "jpeg: not ready" in said
    assert "PIL, no_such_module cannot be imported" in said
    assert f"{sys.executable} -m pip install pillow==" in said
    assert said.rstrip().endswith("no_such_module")


def test_missing_weights_are_named_with_their_download(tmp_path: Path, capsys):
    folder = tmp_path / "PickScore_v1"
    assert main(["doctor", "--scorer", "pickscore", "--option", f"model={folder}"]) == 1
    said = capsys.readouterr().out
    assert "packages: all there" in said
    assert f"hf download yuvalkirstain/PickScore_v1 --local-dir {folder}" in said


def test_what_an_option_has_to_name_is_said_with_a_hint(capsys):
    assert main(["doctor", "--scorer", "geneval"]) == 1
    said = capsys.readouterr().out
    assert "'detector'" in said
    assert "wget https://download.openmmlab.com/" in said


def test_an_unexpected_verdict_shows_what_was_found(monkeypatch, capsys):
    def blind(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        return Scores(np.zeros(1, np.float32), {"strict": np.zeros(1, np.float32)}, [""])

    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", blind)
    assert main(["doctor", "--scorer", "shapes", "--scorer", "jpeg"]) == 1
    said = capsys.readouterr().out
    assert "wanted a red circle is seen; found score 0, raw {'strict': [0.0]}" in said
    assert "jpeg: ready" in said


def test_a_scorer_that_raises_is_not_ready(capsys):
    assert main(["doctor", "--scorer", "bridge_scorers:FailsToLoad"]) == 1
    assert "RuntimeError: no weights in /nowhere" in capsys.readouterr().out


def test_a_scorer_of_your_own_is_loaded(capsys):
    assert main(["doctor", "--scorer", "bridge_scorers:Echo"]) == 0
    assert "no built-in one for a scorer of your own" in capsys.readouterr().out


def test_options_are_for_one_scorer(capsys):
    assert main(["doctor", "--option", "device=cpu"]) == 2
    assert "name it with --scorer" in capsys.readouterr().err


def test_a_server_scores_its_picture_before_it_serves(monkeypatch, capsys):
    def blind(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        return Scores(np.zeros(1, np.float32), {"strict": np.zeros(1, np.float32)}, [""])

    config = ServeConfig(scorer="shapes", listen="unix:/nowhere")
    _ready_scorer(config)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", blind)
    _ready_scorer(config)  # oddly, but it serves: the weights may be a user's own
    assert "oddly: wanted a red circle is seen" in capsys.readouterr().err

    def broken(self: object, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> Scores:
        raise OSError("no such file")

    monkeypatch.setattr("rewards_bridge.scorers.shapes.ShapesScorer.score", broken)
    with pytest.raises(OSError, match="no such file"):
        _ready_scorer(config)

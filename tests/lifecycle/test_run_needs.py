"""Tests of the doctor of a whole run: what it reports as missing, and the commands that it suggests."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import bridge_helpers as helpers
import pytest
import standins
from clip_helpers import make_config, make_folder
from fake_gpus import machine
from running import ROOT

from rewards_bridge.__main__ import main as bridge_main
from udm_grpo import doctor
from udm_grpo.configuration.command_line import parse
from udm_grpo.data.recipe_page import commands_for, fixes, output_of, page_commands
from udm_grpo.lifecycle import run_needs

SHAPES = ("--config", "configs/shapes.py:smoke")
RECIPES = ("geneval", "pickscore", "ocr")


def files_of(name: str) -> list[str]:
    """Return the files that a recipe reads: its start model, its prompts, its scorer's weights."""
    config = parse(["--config", f"configs/{name}.py"])
    options = [value for scorer in config.rewards.scorers.values() for value in scorer.options.values()]
    return [config.model.path, config.prompts.train, config.prompts.heldout, *options]


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_a_recipe_has_the_command_for_every_file_that_it_reads(name, tmp_path, monkeypatch):
    page = page_commands(ROOT / "configs" / f"{name}.py")
    monkeypatch.chdir(tmp_path)  # nothing is here yet
    for place in files_of(name):
        *before, last = (shlex.split(line) for line in fixes(place, place, page))
        output = output_of(last)
        assert output is not None
        assert place == output or place.startswith((f"{output}/", f"{output}:"))
        earlier_outputs = [output_of(command) for command in before]
        assert all(Path(word).parts[0] != "downloads" or word in earlier_outputs for word in last)


def test_commands_are_moved_to_where_the_configuration_reads():
    page = [["curl", "-o", "raw/a.txt", "https://a"], ["python", "-m", "prepare", "raw/a.txt", "--output", "data/a"]]
    assert commands_for("data/a:train", page) == page
    assert fixes("/big/a:train", "data/a:train", page) == [
        "curl -o raw/a.txt https://a",
        "python -m prepare raw/a.txt --output /big/a",
    ]
    assert fixes("/big/mine", "data/a:train", page) == [], "not in the form that the command makes"
    assert fixes("data/b", "data/b", page) == []


def run_doctor(capsys, *words: str) -> tuple[int, dict[str, str], str]:
    """Return (exit status, verdict by check, everything that was printed)."""
    status = doctor.main(list(words))
    said = capsys.readouterr()
    heads = (line.rpartition(": ") for line in said.out.splitlines() if line.endswith((": ready", ": NOT READY")))
    return status, {head: verdict for head, _, verdict in heads}, said.out + said.err


def test_an_empty_folder_lacks_all_files_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    machine(tmp_path, 2)
    status, verdicts, said = run_doctor(capsys, "--config", "configs/geneval.py", "--config.model.path=/nowhere/big")
    assert status == 1
    assert [name for name, verdict in verdicts.items() if verdict == "NOT READY"] == [
        "model.path /nowhere/big",
        "prompts.train data/geneval:train",
        "prompts.heldout data/geneval:test",
        "scorer geneval",
    ]
    assert "fix: hf download BAAI/URSA-1.7B-IBQ512 --local-dir /nowhere/big\n" in said
    detector = "models/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"
    assert f"fix: curl -fL --create-dirs -o {detector} https://download.openmmlab.com/" in said
    assert "fix: hf download openai/clip-vit-large-patch14 --local-dir models/clip-vit-large-patch14\n" in said
    assert "packages: all installed" in said
    assert "needs about 8 GiB; 79.6 GiB of its device" in said, "JAX is on the CPU here, so a GPU is the scorer's"


def test_a_folder_that_holds_all_files_is_ready(tmp_path, monkeypatch, capsys):
    """Tiny random weights get the test images wrong, which check_example=false turns into a warning."""
    standins.make_ursa(tmp_path / "models" / standins.URSA)
    make_folder(tmp_path / "models" / "PickScore_v1", make_config("gelu"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    prompts = [f"--config.prompts.{name}=prompts.txt" for name in ("train", "heldout")]
    words = ("--config", "configs/pickscore.py", *prompts, "--config.rewards.scorers.pickscore.check_example=false")
    status, verdicts, said = run_doctor(capsys, *words)
    assert status == 0, said
    assert set(verdicts.values()) == {"ready"}
    assert "weights: loaded" in said
    assert "only a warning, because check_example is off" in said


def test_a_run_that_needs_no_download_is_ready(capsys):
    status, verdicts, said = run_doctor(capsys, *SHAPES)
    assert status == 0, said
    assert "test images: as expected" in said
    assert verdicts["scorer shapes"] == "ready"


def test_gpus_that_are_not_there_are_said(capsys):
    status, verdicts, said = run_doctor(capsys, *SHAPES, "--config.rewards.scorers.shapes.devices=97")
    assert status == 1
    assert verdicts["GPUs"] == "NOT READY"
    assert "names GPU 97" in said


def test_servers_are_called(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_needs, "CALL_S", 1.0)
    scorer = "--config.rewards.scorers.shapes"
    with helpers.running_server("Echo", f"unix:{tmp_path}/s", "--option", "delay=0.01") as (_, address):
        words = (f"{scorer}.scorer=bridge_scorers:Echo", f"{scorer}.addresses={address}")
        status, verdicts, said = run_doctor(capsys, *SHAPES, *words)
        assert (status, verdicts["scorer shapes"]) == (0, "ready")
        assert f"{address}: serving" in said
        assert "delay is '0.01' at the server" in said
        status, _, said = run_doctor(capsys, *SHAPES, *words, f"{scorer}.scorer=jpeg")
        assert status == 1
        assert "serves scorer 'bridge_scorers:Echo', but 'jpeg' is configured" in said


def test_an_interpreter_that_is_not_there_is_said(capsys):
    status, _, said = run_doctor(capsys, *SHAPES, "--config.rewards.scorers.shapes.interpreter=/nowhere/python")
    assert status == 1
    assert "cannot start the interpreter /nowhere/python" in said


def test_packages_of_the_trainer_are_looked_for_first(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "TRAINER", ("json", "no_such_module"))
    assert doctor.main(list(SHAPES)) == 1
    said = capsys.readouterr().out
    assert "no_such_module cannot be imported" in said
    assert "-m pip install -r " in said


def test_gpus_need_jax_for_them(tmp_path):
    """A machine with NVIDIA GPUs where only JAX for the CPU is installed is not ready."""
    environment = machine(tmp_path, 1)
    gpus = run_needs.visible_gpus(environment)
    (finding,) = run_needs._jax(gpus, environment)
    assert finding.ready or "pip install 'jax[cuda13]==" in finding.lines[0]
    assert list(run_needs._jax(gpus, {**environment, "JAX_PLATFORMS": "cpu"})) == []


def test_the_doctor_of_the_bridge_hands_a_configuration_over(capfd):
    assert bridge_main(["doctor", "--config", "configs/nowhere.py"]) == 2
    assert "there is no configs/nowhere.py" in capfd.readouterr().err
    assert bridge_main(["doctor", "--config", "configs/geneval.py", "--scorer", "jpeg"]) == 2
    assert "leave --scorer, --option and --device out" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        bridge_main(["doctor", "--scorer", "jpeg", "--config.model.path=x"])


def test_memory_that_a_device_has_not_is_said_before_anything_is_loaded(capsys):
    assert bridge_main(["doctor", "--scorer", "jpeg", "--memory", "0.1"]) == 1
    said = capsys.readouterr().out
    assert "memory: needs about 0.5 GiB; 0.1 GiB of its device are available" in said
    assert "test images" not in said
    assert bridge_main(["doctor", "--scorer", "jpeg", "--memory", "2", "--no-load"]) == 0

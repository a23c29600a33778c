"""Trained transformers replace that of a base folder, from every place where users of the public release have them."""

import collections
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_copies as copies
import jax
import numpy as np
import pytest
import torch
from golden_data import first_case, golden_paths

from scripts import demo
from udm_grpo import convert, sample
from udm_grpo.models import open_folder
from udm_grpo.pipeline import load_pipeline
from udm_grpo.released import part_files
from udm_grpo.released.weights import ReleasedModel, WeightsError, load_folder, load_transformer, save_folder
from udm_grpo.scoring.sample_settings import digest_of

BIN = "diffusion_pytorch_model.bin"
OTHER = golden_paths()[-1] / "checkpoint"
"""A model of another size."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copies.copy_checkpoint(tmp_path / "base")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Return a training output folder as the public release writes it: the last weights and their moving average."""
    trained = {name: tensor.float() for name, tensor in copies.load_file(first_case().reference).items()}
    average = {name: tensor * 0.5 for name, tensor in trained.items()}
    for place, state in (("checkpoints", trained), ("ema_checkpoints", average)):
        folder = tmp_path / "run" / place / "checkpoint-100" / "transformer"
        folder.mkdir(parents=True)
        shutil.copy(first_case().checkpoint / "transformer" / "config.json", folder)
        torch.save(collections.OrderedDict(state), folder / BIN)
    return tmp_path / "run"


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def reference(released: ReleasedModel, factor: float = 1) -> Any:
    read = load_transformer(first_case().reference, released.transformer_config)
    return jax.tree.map(lambda leaf: leaf * factor, read)


PLACES: dict[str, tuple[str, float]] = {
    "the file": (f"checkpoints/checkpoint-100/transformer/{BIN}", 1),
    "its folder": ("checkpoints/checkpoint-100/transformer", 1),
    "the checkpoint": ("checkpoints/checkpoint-100", 1),
    "the only checkpoint": ("checkpoints", 1),
    "the average": ("ema_checkpoints/checkpoint-100", 0.5),
    "the only average": ("ema_checkpoints", 0.5),
}


@pytest.mark.parametrize("place", PLACES)
def test_trained_weights_are_taken_over_a_base(place: str, base: Path, release: Path):
    name, factor = PLACES[place]
    before, after = load_folder(base), load_folder(base, transformer_weights=release / name)
    assert_equal(after.transformer, reference(before, factor))
    assert_equal((after.vq, after.path_codebook), (before.vq, before.path_codebook))
    assert after.files == before.files


def test_the_base_needs_no_weights_of_its_own(base: Path, release: Path):
    copies.file_of(base, "transformer").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        load_folder(base)
    pipeline = load_pipeline(base, transformer=release / "checkpoints")
    assert_equal(pipeline.released.transformer, reference(pipeline.released))


def test_a_released_folder_is_a_source_too(base: Path, tmp_path: Path):
    whole = load_folder(base)
    trained = jax.tree.map(lambda leaf: leaf * 2, whole.transformer)
    save_folder(ReleasedModel(**{**vars(whole), "transformer": trained}), tmp_path / "trained")
    assert_equal(load_folder(base, transformer_weights=tmp_path / "trained").transformer, trained)


def test_saving_keeps_the_dtype_of_the_trained_weights(base: Path, release: Path, tmp_path: Path):
    file = release / PLACES["the file"][0]
    half = {name: tensor.bfloat16() for name, tensor in torch.load(file, weights_only=True).items()}
    torch.save(half, tmp_path / "trained.bin")
    save_folder(load_folder(base, transformer_weights=tmp_path / "trained.bin"), tmp_path / "export")
    saved = copies.load_file(copies.file_of(tmp_path / "export", "transformer"))
    assert saved.keys() == half.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in half.items())


def test_a_transformer_of_another_size_is_named(base: Path):
    """The error names every tensor that does not fit, with both shapes, and the contradicting configuration."""
    with pytest.raises(WeightsError) as caught:
        load_folder(base, transformer_weights=OTHER / "transformer")
    message = str(caught.value)
    here, there = (json.loads((path / "transformer" / "config.json").read_text()) for path in (base, OTHER))
    shapes = [(config["lm_head_size"], config["hidden_size"]) for config in (there, here)]
    assert f"wrong shape: lm_head.weight is {shapes[0]}, expected {shapes[1]}" in message
    assert f"hidden_size is {there['hidden_size']} here but {here['hidden_size']} in the base folder" in message
    with pytest.raises(WeightsError, match=r"wrong shape: lm_head.weight is"):  # no configuration beside it
        load_folder(base, transformer_weights=golden_paths()[-1] / "reference_transformer.safetensors")


def test_a_configuration_that_no_shape_tells_is_compared(base: Path, release: Path):
    file = release / "checkpoints" / "checkpoint-100" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.0}))
    with pytest.raises(WeightsError, match=r"1 problem.*\n.*rope_theta is 5.0 here but \S+ in the base folder"):
        load_folder(base, transformer_weights=release / "checkpoints")
    file.write_text("[]")
    with pytest.raises(WeightsError, match=r"config.json: holds a list"):
        load_folder(base, transformer_weights=release / "checkpoints")


def adapter(folder: Path) -> Path:
    (folder / "checkpoint-7" / "transformer").mkdir(parents=True)
    (folder / "checkpoint-7" / "transformer" / "adapter_config.json").write_text("{}")
    return folder / "checkpoint-7"


def several(folder: Path) -> Path:
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-200").mkdir()
    return folder


def text(folder: Path) -> Path:
    (folder / "weights.txt").write_text("no weights")
    return folder / "weights.txt"


def renamed(folder: Path) -> Path:
    file = folder / "trained.bin"
    torch.save({"module.lm_head.weight": torch.zeros(2)}, file)
    return file


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda folder: folder / "nowhere", "nowhere: no such file or folder"),
    "an empty folder": (lambda folder: folder, "no weights; expected"),
    "an adapter": (adapter, "is a PEFT adapter, not a whole transformer; give it as --adapter"),
    "several checkpoints": (several, "has 2 checkpoints: checkpoint-100, checkpoint-200. Give one of them"),
    "a text": (text, r"weights.txt: not a weights file; its name must end with"),
    "other names": (renamed, r"wrong shape: lm_head.weight is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_transformer_is_named(name: str, base: Path, tmp_path: Path):
    make, message = WRONG[name]
    folder = tmp_path / "wrong"
    folder.mkdir()
    with pytest.raises(WeightsError, match=message):
        load_folder(base, transformer_weights=make(folder))


@pytest.mark.parametrize("part", copies.PARTS)
def test_two_files_of_one_part_have_to_be_equal(part: str, base: Path, capsys: pytest.CaptureFixture[str]):
    expected = load_folder(base)
    state = copies.load_file(copies.file_of(base, part))
    torch.save(state, base / part / BIN)
    assert_equal((load_folder(base).transformer, load_folder(base).vq), (expected.transformer, expected.vq))
    name = sorted(state)[1]
    torch.save(state | {name: state[name] + 1}, base / part / BIN)
    message = f"{part}: diffusion_pytorch_model.safetensors and {BIN} hold different weights"
    with pytest.raises(WeightsError, match=message) as caught:
        load_folder(base)
    assert f"({name} has other values). Remove the one" in str(caught.value)
    assert convert.main(["info", str(base)]) == 2
    assert "hold different weights" in capsys.readouterr().err
    torch.save({key: value for key, value in state.items() if key != name}, base / part / BIN)
    with pytest.raises(WeightsError, match=f"{name} is only in one of them"):
        load_folder(base)
    torch.save(state | {name: state[name][:1]}, base / part / BIN)
    with pytest.raises(WeightsError, match=f"{name} is .* in one and .* in the other"):
        load_folder(base)


def test_equal_values_in_another_dtype_are_equal(base: Path, monkeypatch: pytest.MonkeyPatch):
    copies.cast(base, torch.bfloat16)
    folder = base / "transformer"
    state = copies.load_file(copies.file_of(base, "transformer"))
    torch.save({name: tensor.float() for name, tensor in state.items()}, folder / BIN)
    config = load_folder(base).transformer_config
    # A file that has not changed is not compared again: a run opens its folder twice.
    monkeypatch.setattr(part_files, "_equal", None)
    load_transformer(folder, config)
    monkeypatch.undo()
    copies.shard(base)
    torch.save({name: tensor.float() + 1e-3 for name, tensor in state.items()}, folder / BIN)
    with pytest.raises(WeightsError, match=r"index.json and .* hold different weights"):
        load_transformer(folder, config)


def test_rewriting_makes_a_folder_that_draws_the_same(base: Path, release: Path, tmp_path: Path):
    trained, output = str(release / "checkpoints" / "checkpoint-100"), str(tmp_path / "whole")
    assert convert.main(["rewrite", "--base", str(base), "--transformer", trained, "--output", output]) == 0
    over, alone = open_folder(str(base), transformer=trained), open_folder(output)
    assert digest_of(over.released) == digest_of(alone.released)
    assert digest_of(over.released) != digest_of(open_folder(str(base)).released)
    assert over.source == {"checkpoint": str(base), "transformer": trained}


def test_the_demo_shows_the_base_and_the_trained_weights(base: Path, release: Path):
    words = ["--base", str(base), "--transformer", str(release / "ema_checkpoints"), "--scorer", "jpeg"]
    (before, after), _ = demo.open_models(demo._parser().parse_args(words))
    assert after.source == str(release / "ema_checkpoints")
    assert_equal(after.pipeline.released.transformer, reference(after.pipeline.released, 0.5))
    assert_equal(before.pipeline.released.transformer, load_folder(base).transformer)


def test_sampling_refuses_trained_weights_over_a_run(capsys: pytest.CaptureFixture[str]):
    words = ["--run", "run", "--transformer", "file.bin", "--output", "out", "--prompt", "a star"]
    assert sample.main(words) == 2
    assert "--transformer belongs to a released folder" in capsys.readouterr().err

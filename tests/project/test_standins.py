"""The code that the recipes use can read the stand-ins for downloaded files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import standins
import torch
from safetensors.torch import load_file
from standin_clips import make_open_clip, open_clip_tensors

from rewards_bridge.scorers.clip_model import Source, load_clip
from rewards_bridge.scorers.geneval import GenevalScorer
from udm_grpo.data.prompts import read_prompts
from udm_grpo.pipeline import load_pipeline

RELEASE = os.environ.get("UDM_GRPO_RELEASE", "")
"""A folder with the public release's prompt files under their own names; their test is skipped without it."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on models this small, several threads mostly wait for each other on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standins.make(tmp_path_factory.mktemp("user"))


@pytest.mark.usefixtures("compiled_quickly")
def test_the_base_has_320_text_tokens_and_tokens_of_16_pixels(folder: Path) -> None:
    pipeline = load_pipeline(folder / "models" / standins.URSA)
    with pytest.warns(UserWarning, match="special token"):
        ids = pipeline.tokenize(["a photo of a red circle", "<|endoftext|>"])
    assert ids.shape == (2, 320)
    assert (ids[1] == 0).all()
    assert (ids[0, :-30] == 0).all()
    assert (ids[0, -5:] != 0).all()
    image = pipeline.generate(["a photo of a red circle"], steps=2, height=32, width=48)[0]
    assert pipeline.encode(image[None] / np.float32(127.5) - 1).shape == (1, 2, 3)
    assert image.std() > 5  # random, but not uniformly grey


def test_a_training_checkpoint_is_a_transformer_alone(folder: Path) -> None:
    files = sorted(path.relative_to(folder) for path in (folder / "checkpoint-100").rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        "checkpoint-100/transformer/config.json",
        "checkpoint-100/transformer/diffusion_pytorch_model.bin",
    ]
    trained = torch.load(folder / files[1], weights_only=True)
    base = load_file(folder / "models" / standins.URSA / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert not any(torch.equal(trained[name], base[name]) for name in base)


def test_genevals_judge_finds_objects(folder: Path) -> None:
    """The detector is read under both names, that of the download and the one without its date."""
    models = folder / "models"
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    counts = []
    for detector in (standins.DETECTOR, standins.DOWNLOADED_DETECTOR):
        clip = str(models / "clip-vit-large-patch14")
        scorer = GenevalScorer(str(models / detector), clip, device="cpu", any_size=True)
        (objects,) = scorer.detector.detect(image)
        counts.append({name: len(several) for name, several in objects.items()})
    assert counts[0] == counts[1] != {}


@pytest.mark.parametrize("name", ["clip-vit-large-patch14", "PickScore_v1"])
def test_a_clip_of_transformers_is_read(folder: Path, name: str) -> None:
    source = Source("pickscore", "model", str(folder / "models" / name), "some/clip")
    clip = load_clip(source, source, "cpu", "float32", 2)
    assert clip.logits(np.zeros((1, 8, 8, 3), np.uint8), ["a cat"]).shape == (1,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "open_clip_pytorch_model.bin"])
def test_a_clip_of_open_clip_is_its_configuration_and_its_tensors(tmp_path: Path, file: str) -> None:
    clip = make_open_clip(tmp_path / "vit_large_patch14_clip_224.openai", file)
    assert sorted(path.name for path in clip.iterdir()) == sorted(["open_clip_config.json", file])
    tensors = torch.load(clip / file, weights_only=True)
    assert tensors["visual.conv1.weight"].shape == (64, 3, 8, 8)
    assert tensors.keys() == open_clip_tensors(0).keys()


def test_every_prompt_file_is_read(folder: Path) -> None:
    for file in ("geneval/train_metadata.jsonl", "geneval/evaluation_metadata.jsonl", "pickscore/train.txt"):
        assert len(read_prompts(folder / "data" / file)) >= 6
    assert all(prompt.count('"') == 2 for prompt in read_prompts(folder / "data" / "ocr" / "train.txt").prompts)


@pytest.mark.skipif(not RELEASE, reason="UDM_GRPO_RELEASE names no folder with the release's prompt files")
def test_the_releases_own_files_have_the_forms_of_the_stand_ins(folder: Path) -> None:
    """Every entry has the same keys with values of the same types."""
    pairs = {
        "geneval_evaluation_metadata.jsonl": "geneval/evaluation_metadata.jsonl",
        "geneval_prompts.json": "geneval/prompts.json",
        "pickscore_prompts.json": "pickscore/prompts.json",
        "dpgbench_prompts.json": "dpgbench/prompts.json",
        "pickscore_test.txt": "pickscore/test.txt",
    }
    for theirs, ours in pairs.items():
        real, standin = (entries(path) for path in (Path(RELEASE) / theirs, folder / "data" / ours))
        assert len(real) >= 500
        assert {_form(entry) for entry in real} == {_form(entry) for entry in standin}


def entries(path: Path) -> list:
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) if path.suffix == ".jsonl" else line for line in text.splitlines()]


def _form(entry: object) -> object:
    """Return the form of an entry: its keys, recursively, and the types of its values."""
    if isinstance(entry, dict):
        return tuple(sorted((name, _form(value)) for name, value in entry.items()))
    if isinstance(entry, list):
        return tuple(dict.fromkeys(_form(part) for part in entry))
    return type(entry).__name__

"""Prepared folders: rows survive a round trip, damage is reported, and nothing needs TensorFlow or a network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from udm_grpo.data.prompt_dataset import read_dataset, write_dataset
from udm_grpo.data.prompts import PromptSet, read_prompts

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "udm_grpo" / "assets" / "shapes-prompts"
ODD = ({"tag": "ä", "prompt": '"日本"\n\u2028 \U0001f600', "more": [1, {"x": None}]}, {"tag": "b", "prompt": "b"})


@pytest.fixture(scope="module")
def shapes():
    return {"train": read_prompts(SHAPES / "train.jsonl"), "test": read_prompts(SHAPES / "heldout.jsonl")}


@pytest.fixture(scope="module")
def folder(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "shapes"
    write_dataset(path, {split: prompts.metadata for split, prompts in shapes.items()})
    return path


def test_a_prepared_set_is_the_set_of_its_file(folder, shapes):
    """The same PromptSet, so that everything downstream works unchanged, and the same batches."""
    assert read_prompts(f"{folder}:train") == shapes["train"]
    assert read_prompts(f"{folder}:test") == shapes["test"]
    weights = dict.fromkeys(shapes["train"].tags, 1) | {"position": 7}
    weighted = read_prompts(f"{folder}:train", weights)
    again = PromptSet(weighted.prompts, weighted.metadata, weighted.tags, weights)
    for step in (0, 5, 1000):
        assert weighted.batch(step, 8, 3)[0] == again.batch(step, 8, 3)[0]


def test_anything_that_reads_tfds_reads_it(folder, shapes):
    source = tfds.data_source("udm_grpo_prompts", data_dir=folder, split="test", download=False)
    assert len(source) == len(shapes["test"])
    assert source[3]["prompt"].decode() == shapes["test"].prompts[3]
    assert source[3]["tag"].decode() == shapes["test"].tags[3]
    assert "tensorflow" not in sys.modules
    assert sorted(path.name for path in folder.iterdir()) == ["udm_grpo_prompts"]


def test_any_text_and_any_metadata_survive_and_a_prepared_folder_is_replaced(tmp_path):
    write_dataset(tmp_path / "set", {"train": ODD[1:]})
    write_dataset(tmp_path / "set", {"train": ODD})
    assert read_dataset(tmp_path / "set") == ODD
    assert read_prompts(tmp_path / "set").metadata == ODD  # the only split needs no name
    colon = tmp_path / "a:b"
    write_dataset(colon, {"x": ODD})
    assert read_prompts(colon) == read_prompts(f"{colon}:x")


def test_splits_have_to_be_named_and_to_exist(folder):
    for path in (folder, f"{folder}:valid", f"{folder}:"):
        with pytest.raises(ValueError, match=r"has (several splits|no split 'valid'); write .*:test or .*:train"):
            read_prompts(path)
    with pytest.raises(ValueError, match=r"was not made by scripts\.prepare_prompts; only such folders have splits"):
        read_prompts(f"{SHAPES}:train")
    with pytest.raises(ValueError, match="no weight for the tag"):
        read_prompts(f"{folder}:train", {"colors": 1})


def test_what_cannot_be_written_is_refused_and_leaves_things_as_they_were(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not overwritten; choose another folder"):
        write_dataset(tmp_path, {"train": ODD})
    with pytest.raises(ValueError, match="the split test has no prompts"):
        write_dataset(tmp_path / "set", {"train": ODD, "test": ()})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:70_000])


def scribble(file):
    data = bytearray(file.read_bytes())
    data[66_000:66_020] = b"x" * 20
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, scribble, lambda file: file.write_bytes(b""), Path.unlink])
def test_a_damaged_folder_says_so(tmp_path, folder, damage):
    there = shutil.copytree(folder, tmp_path / "set")
    damage(next(there.glob("*/*/*train.array_record*")))
    with pytest.raises(ValueError, match=r"set: the prepared prompts cannot be read \(.+\); prepare them again"):
        read_prompts(f"{there}:train")


@pytest.mark.parametrize("content", ["", "{}", "oops"])
def test_a_folder_without_its_description_says_so(tmp_path, folder, content):
    there = shutil.copytree(folder, tmp_path / "set")
    next(there.glob("*/*/dataset_info.json")).write_text(content)
    with pytest.raises(ValueError, match="prepare them again"):
        read_prompts(f"{there}:train")


def test_only_a_prepared_folder_costs_the_import_of_tfds(folder):
    code = (
        "import sys, udm_grpo.sample, udm_grpo.train; from udm_grpo.data.prompts import read_prompts;"
        f"read_prompts({str(SHAPES / 'train.jsonl')!r}); print('tensorflow_datasets' in sys.modules);"
        f"read_prompts({str(folder)!r} + ':test'); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

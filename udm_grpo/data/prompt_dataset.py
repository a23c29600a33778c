"""Prompt sets as TensorFlow Datasets folders: ArrayRecord files, built and read without TensorFlow.

    write_dataset("data/geneval", {"train": rows, "test": other_rows})
    rows = read_dataset("data/geneval", "train")

An example is {"prompt", "tag", "metadata"}; metadata is the whole row as JSON. Any TFDS reader can read the folders:
tfds.data_source("udm_grpo_prompts", data_dir="data/geneval", split="train").
"""

import contextlib
import gc
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from udm_grpo.data.prompt_files import DATASET, Row
from udm_grpo.data.prompt_text import PromptsError
from udm_grpo.files.atomic import replacing_folder
from udm_grpo.machine.progress import progress_bar

VERSION = "1.0.0"
INFO = f"{DATASET}/{VERSION}/dataset_info.json"
"""A file that every prepared folder has."""


class UdmGrpoPrompts(tfds.core.GeneratorBasedBuilder):
    """Builds a dataset from rows in memory, {split: rows}, each row {"tag", "prompt", ...}; their order is kept."""

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {"1.0.0": "prompt, tag, and the whole row as JSON"}  # noqa: RUF012 (the base class reads it there)

    def __init__(self, splits: Mapping[str, Sequence[Row]] | None = None, **settings: Any) -> None:
        self._rows = splits or {}  # TFDS passes no splits when it creates a builder for reading
        super().__init__(**settings)

    def _info(self) -> Any:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"prompt": text, "tag": text, "metadata": text})
        # Without disable_shuffling, TFDS reorders examples by the hash of their keys.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, str]]]:
        with progress_bar(len(rows), "writing", "prompt") as bar:
            for index, row in enumerate(rows):
                yield index, {"prompt": row["prompt"], "tag": row["tag"], "metadata": json.dumps(row)}
                bar.update()


def write_dataset(folder: str | Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write a prepared folder atomically; an existing one is replaced.

    Raises FileExistsError if `folder` is anything else, PromptsError for a split without rows, OSError.
    """
    for split, rows in splits.items():
        if not rows:
            raise PromptsError(f"the split {split} has no prompts; a split needs at least one")
    with replacing_folder(Path(folder), INFO) as fresh, contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        # TFDS's default format, TFRecord, needs TensorFlow.
        builder = UdmGrpoPrompts(splits, data_dir=fresh, file_format="array_record")
        builder.download_and_prepare()
        shutil.rmtree(fresh / "downloads", ignore_errors=True)  # TFDS leaves it empty


def split_names(folder: str | Path) -> list[str]:
    """Return the splits of a prepared folder; ValueError if it is damaged."""
    try:
        return sorted(tfds.builder_from_directory(Path(folder) / DATASET / VERSION).info.splits)
    except Exception as error:
        raise _damaged(folder, error) from error


def read_dataset(folder: str | Path, split: str = "") -> tuple[Row, ...]:
    """Return the rows of a split, in order; "" means the only split.

    Raises PromptsError for an unknown split, if none is named where there are several (it names them), and for damaged
    files.
    """
    names = split_names(folder)
    if not split and len(names) == 1:
        split = names[0]
    if split not in names:
        problem = f"has no split {split!r}" if split else "has several splits"
        raise PromptsError(f"{folder} {problem}; write {' or '.join(f'{folder}:{name}' for name in names)}")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        source = tfds.data_source(
            f"{DATASET}:{VERSION}", data_dir=folder, split=split, download=False, deserialize_method=raw
        )
        with _uncollected():
            # One call reads all examples, and only the metadata is decoded: TFDS's own decoding of 50,000 takes 2.5 s.
            examples = map(tf_example_pb2.Example.FromString, source.__getitems__(range(len(source))))
            features = (example.features.feature for example in examples)
            return tuple(json.loads(feature["metadata"].bytes_list.value[0].decode()) for feature in features)
    except Exception as error:
        raise _damaged(folder, error) from error


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disable garbage collection, which takes a fifth of the time of creating many small dicts and frees nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _damaged(folder: str | Path, error: Exception) -> PromptsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return PromptsError(f"{folder}: the prepared prompts cannot be read ({reason}); prepare them again")

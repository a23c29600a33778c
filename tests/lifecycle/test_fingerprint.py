"""Tests of what may change on resume and what may not: every field, and files by content, not by location."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import manual
from running import ROOT, SMOKE
from safetensors.numpy import load_file, save_file

from udm_grpo.checkpoints.checkpoint import CheckpointError
from udm_grpo.config import RunConfig, ScorerConfig
from udm_grpo.configuration.command_line import parse
from udm_grpo.configuration.config_fields import field_values
from udm_grpo.data.prompts import read_prompts
from udm_grpo.files import digests
from udm_grpo.lifecycle.fingerprint import FREE, PLACE, comparable, fingerprint, free_fields, is_free
from udm_grpo.lifecycle.identity import check_continues
from udm_grpo.released.weights import load_folder

CONFIG = parse(["--config", str(ROOT / SMOKE)])
WEIGHTS = "diffusion_pytorch_model.safetensors"


def fingerprint_of(config: RunConfig) -> dict[str, Any]:
    """Return the fingerprint that a start computes from the files that the configuration names."""
    trained = config.model.transformer or None
    released = load_folder(config.model.path, read_transformer=False, transformer_weights=trained)
    sets = (
        read_prompts(file, key=config.prompts.prompt_key) for file in (config.prompts.train, config.prompts.heldout)
    )
    return fingerprint(config, released, *sets)


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    return fingerprint_of(CONFIG)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the field names in the error that refuses the resume."""
    try:
        check_continues({"fingerprint": saved}, now)
    except CheckpointError as error:
        lines = str(error).splitlines()[1:-1]
        return [line.strip().partition(":")[0] for line in lines]
    return []


def flipped(name: str, value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if name == "grpo.objective":
        return "udm_grpo.grpo.loss:UDMGRPO"
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (*value, "7" if name.endswith(("addresses", "devices", "targets")) else 7)
    assert isinstance(value, dict), name
    return {**value, "colors": 99.0 if name.endswith("tag_weights") else "99"}


def with_field(config: RunConfig, name: str, value: Any) -> RunConfig:
    """Return a copy of a configuration with another value of one field."""
    changed = copy.deepcopy(config)
    node: Any = changed
    *parts, last = name.split(".")
    for part in parts:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    setattr(node, last, value)
    return changed


def configurations() -> Iterator[RunConfig]:
    """Yield the smoke run, and one for which every condition in free_fields is the opposite."""
    yield CONFIG
    other = copy.deepcopy(CONFIG)
    other.optimizer.schedule, other.checkpoint.keep_best, other.lora.rank = "constant", True, 4
    yield other


@pytest.mark.parametrize("config", [*configurations()], ids=["smoke", "other"])
def test_every_field_is_refused_by_name_or_listed_as_free(config: RunConfig) -> None:
    released = load_folder(config.model.path, read_transformer=False)
    sets = [read_prompts(file) for file in (config.prompts.train, config.prompts.heldout)]
    before, free = fingerprint(config, released, *sets), free_fields(config)
    values = field_values(config)
    assert len(values) > 90
    for name, value in values:
        if FREE.get(name) == PLACE:
            continue  # see below
        names = differences(before, fingerprint(with_field(config, name, flipped(name, value)), released, *sets))
        if is_free(name, free):
            assert names == [], name
        else:
            assert [part for part in names if part == name or part.startswith(f"{name}.")], f"{name}: {names}"


def test_all_free_fields_exist_and_the_readme_lists_them() -> None:
    names = [name for name, _ in field_values(CONFIG)]
    readme = manual()
    for pattern in (*free_fields(with_field(CONFIG, "optimizer.schedule", "constant")), *FREE):
        assert any(is_free(name, {pattern: ""}) for name in names), pattern
        assert f"`{pattern.replace('scorers.*', 'scorers.NAME')}`" in readme, pattern


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        tensors = load_file(file)
        name = sorted(tensors)[-1]
        save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})

    return apply


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes)) and None


ADD = weights(lambda tensor: tensor + np.asarray(1e-3, tensor.dtype))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        (f"transformer/{WEIGHTS}", ADD, ["model.transformer"]),
        ("transformer/config.json", settings(rope_theta=5000), ["model.path.transformer"]),
        (f"vae/{WEIGHTS}", ADD, ["model.path.vae"]),
        ("scheduler/scheduler_config.json", settings(shift=1.25), ["model.path.scheduler"]),
        ("tokenizer/tokenizer_config.json", settings(extra=1), ["model.path.tokenizer"]),
        ("model_index.json", settings(extra=1), []),
        ("README.md", lambda file: file.write_text("moved") and None, []),
    ],
)
def test_a_models_files_count_by_what_they_hold(
    saved: dict[str, Any], tmp_path: Path, file: str, change: Callable[[Path], None], named: list[str]
) -> None:
    folder = Path(shutil.copytree(CONFIG.model.path, tmp_path / "model"))
    moved = with_field(CONFIG, "model.path", str(folder))
    assert differences(saved, fingerprint_of(moved)) == []
    change(folder / file)
    assert differences(saved, fingerprint_of(moved)) == named


def test_trained_weights_count_by_what_they_hold(saved: dict[str, Any], tmp_path: Path) -> None:
    file = Path(shutil.copy(Path(CONFIG.model.path) / "transformer" / WEIGHTS, tmp_path / WEIGHTS))
    changed = with_field(CONFIG, "model.transformer", str(file))
    assert differences(saved, fingerprint_of(changed)) == []
    ADD(file)
    assert differences(saved, fingerprint_of(changed)) == ["model.transformer"]


@pytest.mark.parametrize("which", ["train", "heldout"])
def test_prompts_count_by_what_they_hold(saved: dict[str, Any], tmp_path: Path, which: str) -> None:
    file = Path(shutil.copy(getattr(CONFIG.prompts, which), tmp_path / "prompts.jsonl"))
    moved = with_field(CONFIG, f"prompts.{which}", str(file))
    assert differences(saved, fingerprint_of(moved)) == []
    lines = file.read_text().splitlines()
    array = tmp_path / "prompts.json"
    array.write_text(json.dumps([json.loads(line) for line in lines]))
    assert differences(saved, fingerprint_of(with_field(CONFIG, f"prompts.{which}", str(array)))) == []
    file.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert differences(saved, fingerprint_of(moved)) == [f"prompts.{which}.contents"], "their order decides"


def test_a_scorers_options_count_unless_they_are_places_or_how_it_is_run(tmp_path: Path) -> None:
    def options(**values: str) -> dict[str, Any]:
        return with_options(values)["rewards"]["scorers"]["g"]["options"]

    def with_options(values: dict[str, str], *addresses: str) -> dict[str, Any]:
        config = copy.deepcopy(CONFIG)
        config.rewards.scorers["g"] = ScorerConfig(scorer="geneval", options=values, addresses=addresses)
        return fingerprint(config, released, *sets)

    released = load_folder(CONFIG.model.path, read_transformer=False)
    sets = [read_prompts(CONFIG.prompts.train)] * 2
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "detector.pth").write_bytes(b"1" if folder != "three" else b"3")
    first = options(detector=str(tmp_path / "one" / "detector.pth"), device="cuda:0", api_key="secret", dtype="float32")
    assert first == options(detector=str(tmp_path / "two" / "detector.pth"), dtype="float32", cpu_threads="4")
    assert first != options(detector=str(tmp_path / "three" / "detector.pth"), dtype="float32")
    assert first != options(detector=str(tmp_path / "one" / "detector.pth"), dtype="bfloat16")
    assert options(clip=str(tmp_path / "one")) == options(clip=str(tmp_path / "two")) != options(clip="openai/clip")
    (tmp_path / "key").write_text("sesame")
    assert options(endpoint="https://me:sesame@host", api_key_file=str(tmp_path / "key")) == {
        "endpoint": "https://***@host"
    }
    remote = with_options({"detector": "/on/the/server.pth", "dtype": "float32"}, "gpu-0:50051")
    assert remote["rewards"]["scorers"]["g"]["options"] == {"dtype": "float32"}


def test_a_checkpoint_from_before_a_field_was_added_has_its_default(saved: dict[str, Any]) -> None:
    earlier = copy.deepcopy(saved)
    del earlier["grpo"]["objective"]
    assert differences(earlier, saved) == []
    del earlier["evaluation"]["guidance_scales"]
    assert differences(earlier, saved) == []
    now = fingerprint_of(with_field(CONFIG, "evaluation.guidance_scales", (3.0,)))
    assert differences(earlier, now) == ["evaluation.guidance_scales.0"]
    now = fingerprint_of(with_field(CONFIG, "grpo.objective", "udm_grpo.grpo.loss:UDMGRPO"))
    assert "grpo.objective" in differences(earlier, now)


def test_the_file_of_a_users_objective_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "objective_of_mine.py"
    source.write_text("from udm_grpo.grpo.loss import UDMGRPO\n\n\nclass Mine(UDMGRPO):\n    pass\n")
    config = with_field(CONFIG, "grpo.objective", "objective_of_mine:Mine")
    before = fingerprint_of(config)
    assert differences(before, fingerprint_of(config)) == []
    source.write_text(source.read_text() + "    kl = 0\n")
    assert differences(before, fingerprint_of(config)) == ["grpo.objective.contents"]


def test_a_checkpoint_of_an_earlier_version_is_compared_as_far_as_it_says(saved: dict[str, Any]) -> None:
    old = {"seed": 0, "model": {"dtype": "float32"}, "prompts": {"train": "there.jsonl"}, "rewards": {"shapes": {}}}
    with pytest.warns(UserWarning, match="earlier version"):
        assert differences(old, saved) == []
    with pytest.warns(UserWarning, match="earlier version"):
        assert differences({**old, "seed": 1}, saved) == ["seed"]
    assert comparable(saved, saved) == (saved, saved)
    with_login = {"version": 2, "rewards": {"endpoint": "https://me:sesame@host"}}
    assert comparable(with_login, saved)[0]["rewards"] == {"endpoint": "https://***@host"}


def test_large_files_are_sampled_and_every_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE_BYTES", 0), ("EDGE_BYTES", 64), ("BLOCK_BYTES", 16), ("BLOCKS", 4)):
        monkeypatch.setattr(digests, name, value)
    tensors = {f"layer.{number}": np.full((50, 50), number, np.float32) for number in range(20)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    before = digests.digest_file(file)
    save_file(tensors, tmp_path / "y.safetensors")
    assert digests.digest_file(tmp_path / "y.safetensors") == before
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, file)
        assert digests.digest_file(file) != before, name

"""Adapters in PEFT's form, read and written, against PEFT itself on the independent PyTorch model."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from golden_data import assert_close, first_case
from safetensors.numpy import load_file, save_file

from scripts.torch_reference import load_reference
from udm_grpo.batches import Params
from udm_grpo.host.peft_files import merge_on_host, read_adapter, with_adapter, write_adapter
from udm_grpo.host.weights import Checkpoint, WeightsError, load_folder
from udm_grpo.model import lora
from udm_grpo.pipeline import Pipeline

BASE = first_case().checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 3, 7.5


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_folder(BASE)


def adapter_of(checkpoint: Checkpoint, *patterns: str) -> Params:
    """Numbers that change the logits much."""
    random = np.random.default_rng(0)
    form = lora.abstract(checkpoint.transformer_config, RANK, lora.targets(patterns))
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), form)


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("peft") / "adapter"
    write_adapter(made, adapter_of(checkpoint, "*_proj"), ALPHA)
    return made


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    arrays = first_case().arrays
    with torch.inference_mode():
        return model(*(torch.from_numpy(np.array(arrays[name])) for name in ("prompt_ids", "image_ids"))).numpy()


def our_logits(checkpoint: Checkpoint, params: Params) -> np.ndarray:
    arrays = first_case().arrays
    pipeline = Pipeline(dataclasses.replace(checkpoint, transformer=params))
    return np.asarray(pipeline.logits(arrays["prompt_ids"], arrays["image_ids"]))


@pytest.mark.parametrize("patterns", [("*_proj",), ("q_proj", "v_proj", "down_proj")])
def test_peft_computes_what_we_do(patterns: tuple[str, ...], checkpoint: Checkpoint, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, *patterns)
    write_adapter(tmp_path / "adapter", adapter, ALPHA)
    wanted = torch_logits(peft.PeftModel.from_pretrained(load_reference(BASE), tmp_path / "adapter"))
    attached = lora.attach(checkpoint.transformer, lora.scaled(adapter, ALPHA / RANK))
    assert_close(our_logits(checkpoint, attached), wanted)
    merged = merge_on_host(checkpoint.transformer, adapter, ALPHA / RANK)
    assert_close(our_logits(checkpoint, merged), wanted)
    jax.tree.map(
        np.testing.assert_array_equal,
        with_adapter(checkpoint.transformer, tmp_path / "adapter", checkpoint.transformer_config),
        merged,
    )
    plain = our_logits(checkpoint, checkpoint.transformer)
    assert np.abs(plain - wanted).max() > 0.1 * np.abs(wanted).max()


def test_there_and_back(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    found, alpha = read_adapter(folder, checkpoint.transformer_config)
    assert alpha == ALPHA
    jax.tree.map(np.testing.assert_array_equal, found, adapter_of(checkpoint, "*_proj"))
    # And as PEFT itself saves it.
    peft.PeftModel.from_pretrained(load_reference(BASE), folder).save_pretrained(tmp_path)
    saved, alpha = read_adapter(tmp_path, checkpoint.transformer_config)
    assert alpha == ALPHA
    jax.tree.map(np.testing.assert_array_equal, saved, found)


def set_fields(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return edit


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json: cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("["), "adapter_config.json: is not JSON"),
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "truncated or damaged, 99 bytes"),
        (set_fields(peft_type="IA3"), "peft_type is 'IA3'; wanted 'LORA'"),
        (set_fields(r=True), "r is True; wanted a whole number above 0"),
        (set_fields(lora_alpha="2"), "lora_alpha is '2'; wanted a number above 0"),
        (set_fields(use_dora=True, bias="all"), "bias is 'all', which is not supported; merge that adapter with PEFT"),
        (set_fields(use_rslora=True), "use_rslora is True, which is not supported"),
        (set_fields(r=4), "q_proj.lora_A.weight is (3, 64), wanted (4, 64)"),
        (set_fields(r=65), "the rank is 65, more than the smaller side of q_proj is 64 x"),
        (rename("layers.1.mlp.up", "layers.9.mlp.up"), "not known: base_model.model.model.layers.9.mlp.up_proj.lora_A"),
        (rename("layers.1.mlp.up", "layers.9.mlp.up"), "missing: base_model.model.model.layers.1.mlp.up_proj.lora_B"),
        (rename("_proj", "_projection"), "adapts nothing of this model: found base_model.model.model.layers.0"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    edit: Callable[[Path], None], said: str, folder: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "adapter")
    edit(tmp_path / "adapter")
    with pytest.raises(WeightsError) as caught:
        read_adapter(tmp_path / "adapter", checkpoint.transformer_config)
    assert said in str(caught.value)


def test_nothing_else_is_overwritten(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint, "q_proj")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds no adapter_config\.json"):
        write_adapter(tmp_path, adapter, ALPHA)
    shutil.copytree(folder, tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", adapter, 3.0)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["target_modules"], config["lora_alpha"], config["r"]) == (["q_proj"], 3, 3)

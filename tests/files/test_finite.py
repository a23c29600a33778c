"""Weights that are not finite are reported by name, and never saved, exported or started from."""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from udm_grpo.checkpoints import checkpoint as checkpoint_module
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints, restore
from udm_grpo.files import finite
from udm_grpo.files.finite import finite_number, named, nonfinite
from udm_grpo.model import lora
from udm_grpo.multihost import hosts
from udm_grpo.released.peft_files import read_adapter, write_adapter
from udm_grpo.released.weights import load_folder, load_transformer, save_folder
from udm_grpo.tensor_files.torch_files import WeightsError

BASE = Path(__file__).resolve().parents[2] / "udm_grpo" / "assets" / "ursa-shapes"
BAD = (np.nan, np.inf, -np.inf)
HEAD = "lm_head.weight"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_bad_number_is_found_wherever_it_is(bad: float, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"whole": jnp.arange(3), "flag": np.bool_(True), "a": jnp.ones((2, 70), dtype), "b": np.ones(5, dtype)}
    assert nonfinite(good) == []
    for at in (0, 69):
        broken = good | {"a": good["a"].at[1, at].set(bad), "c": np.full(1, bad, dtype)}
        assert nonfinite(broken) == ["a", "c"]
        with monkeypatch.context() as on_a_device:
            on_a_device.setattr(finite, "_on_this_host", lambda leaf: False)
            assert nonfinite(broken) == ["a", "c"]
    assert named(["a"] * 7) == "a, a, a, a, a and 2 more"


def test_flags_take_finite_numbers_only() -> None:
    assert finite_number("1e-4") == 1e-4
    for text in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a finite number"):
            finite_number(text)


def test_a_checkpoint_with_a_bad_number_is_neither_saved_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"params": {"a": jnp.ones(3)}, "count": jnp.int32(1)}
    broken = {"params": {"a": jnp.float32([1, np.nan, 1])}, "count": jnp.int32(2)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, good, {})
    for save in (checkpoints.save, checkpoints.save_best):
        with pytest.raises(CheckpointError, match="is not saved: NaN or infinite numbers in params/a"):
            save(2, broken, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "best"] == ["00000001"]
    with monkeypatch.context() as careless:
        careless.setattr(checkpoint_module, "nonfinite", lambda leaves: [])
        path = checkpoints.save(3, broken, {})
    with pytest.raises(CheckpointError, match="00000003: NaN or infinite numbers in params/a"):
        restore(path, good)


def broken_base(folder: Path, file: str, name: str, bad: float) -> Path:
    """Copy the shipped base with one bad number in a tensor."""
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / file)
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = bad
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("part", "name"), [("transformer", HEAD), ("vae", "decoder.conv_in.bias")])
def test_a_start_model_with_a_bad_number_is_refused_by_the_name_of_the_tensor(
    tmp_path: Path, part: str, name: str
) -> None:
    file = f"{part}/diffusion_pytorch_model.safetensors"
    folder = broken_base(tmp_path / "base", file, name, np.nan)
    with pytest.raises(WeightsError, match=f"base/{part}: numbers that are NaN, infinite .* in {name}$"):
        load_folder(folder)
    if part == "transformer":  # as training reads it, and as weights over a base
        config = load_folder(BASE, read_transformer=False).transformer_config
        with pytest.raises(WeightsError, match=f"in {name}$"):
            load_transformer(folder / part, config, "bfloat16")
        with pytest.raises(WeightsError, match=f"in {name}$"):
            load_folder(BASE, transformer_weights=folder / part)


def test_weights_too_large_for_their_dtype_are_refused(tmp_path: Path) -> None:
    folder = broken_base(tmp_path / "base", "transformer/diffusion_pytorch_model.safetensors", HEAD, 1e6)
    load_folder(folder)
    with pytest.raises(WeightsError, match=f"too large for float16 in {HEAD}$"):
        load_folder(folder, "float16")


def test_a_codebook_with_a_bad_number_is_refused(tmp_path: Path) -> None:
    model = load_folder(BASE)
    broken = dataclasses.replace(model, path_codebook=model.path_codebook.at[3, 0].set(jnp.nan))
    with pytest.raises(WeightsError, match=r"scheduler: path.emb has NaN or infinite numbers"):
        save_folder(broken, tmp_path / "a")
    save_folder(model, tmp_path / "a")
    codebook = torch.from_numpy(np.array(broken.path_codebook))
    torch.save({"path.emb": codebook}, tmp_path / "a" / "scheduler" / "scheduler_model.pth")
    with pytest.raises(WeightsError, match=r"scheduler_model.pth: NaN or infinite numbers in path.emb"):
        load_folder(tmp_path / "a")


@pytest.mark.parametrize("bad", BAD)
def test_bad_weights_are_not_exported_and_every_process_says_so(tmp_path: Path, bad: float) -> None:
    model = load_folder(BASE)
    save_folder(model, tmp_path / "export")
    before = (tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    kernel = model.transformer["lm_head"]["kernel"].at[-1, -1].set(bad)
    broken = dataclasses.replace(model, transformer=model.transformer | {"lm_head": {"kernel": kernel}})
    for write in (True, False):
        with pytest.raises(WeightsError, match=f"transformer: {HEAD} has NaN or infinite numbers"):
            save_folder(broken, tmp_path / "export", fetch=hosts.block, write=write)
    assert (tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_adapter_with_a_bad_number_is_neither_written_nor_read(tmp_path: Path) -> None:
    config = load_folder(BASE, read_transformer=False).transformer_config
    adapter = lora.init(lora.abstract(config, 2, ("q_proj",)), jax.random.key(0))
    write_adapter(tmp_path / "adapter", adapter, 4.0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    leaf = adapter["layers"]["attn"]["q"]["lora_a"]
    adapter["layers"]["attn"]["q"]["lora_a"] = leaf.at[0, 0, 0].set(jnp.inf)
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers in base_model.*lora_A"):
        write_adapter(tmp_path / "other", adapter, 4.0)
    assert not (tmp_path / "other").exists()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=f"in {name}$"):
        read_adapter(tmp_path / "adapter", config)

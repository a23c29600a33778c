"""Weights from other sources: wrapped, as variants, in shards or half downloaded; they are read or clearly refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_copies as copies
import jax
import numpy as np
import pytest
import torch
from golden_data import first_case
from safetensors.torch import load_file, save_file

from udm_grpo.released import contents
from udm_grpo.released.weights import WeightsError, load_folder, load_transformer, save_folder

STEM = "diffusion_pytorch_model"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copies.copy_checkpoint(tmp_path / "base")


def wrap(folder: Path, part: str, rename: Callable[[str], str]) -> None:
    file = copies.file_of(folder, part)
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


WRAPPERS: dict[str, tuple[Callable[[str], str], str]] = {
    "DDP or DeepSpeed": (lambda name: f"module.{name}", "'module.' in them"),
    "torch.compile": (lambda name: f"_orig_mod.{name}", "'_orig_mod.' in them"),
    "Lightning": (lambda name: f"model.{name}", "'model.' in them"),
    "both": (lambda name: f"module.transformer.{name}", "'module.' and 'transformer.' in them"),
    "FSDP": (lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."), "'_fsdp_wrapped_module.' in them"),
    "compiled layers": (lambda name: name.replace(".mlp.", "._orig_mod.mlp."), "'_orig_mod.' in them"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_s_names_are_recognised_and_left_out(kind: str, base: Path, tmp_path: Path, capsys):
    """One line on stderr says so; an export has the usual names again."""
    rename, said = WRAPPERS[kind]
    before = load_folder(base)
    assert capsys.readouterr().err == ""
    wrap(base, "transformer", rename)
    after = load_folder(base)
    jax.tree.map(np.testing.assert_array_equal, after.transformer, before.transformer)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_transformer(base / "transformer", after.transformer_config),
        before.transformer,
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {base / 'transformer'}: ")
    assert said in line
    save_folder(after, tmp_path / "export")
    names = load_file(copies.file_of(tmp_path / "export", "transformer")).keys()
    assert names == load_file(first_case().reference).keys()


def test_other_parts_and_files_are_unwrapped_too(base: Path, tmp_path: Path):
    before = load_folder(base)
    wrap(base, "vae", lambda name: f"_orig_mod.{name}")
    trained = {f"module.{name}": tensor * 2 for name, tensor in load_file(copies.file_of(base, "transformer")).items()}
    torch.save({"state_dict": trained, "epoch": 3, "lr": [0.1]}, tmp_path / "trained.bin")
    after = load_folder(base, transformer_weights=tmp_path / "trained.bin")
    jax.tree.map(np.testing.assert_array_equal, after.vq, before.vq)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), after.transformer, before.transformer)


def error_of(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_folder(folder)
    return str(caught.value)


def test_a_model_that_is_there_twice_is_not_guessed(base: Path):
    file = copies.file_of(base, "transformer")
    tensors = load_file(file)
    both = {f"{prefix}.{name}": tensor.clone() for prefix in ("ema", "generator") for name, tensor in tensors.items()}
    save_file(both, file)
    assert "the file holds the model more than once, under 'ema.' and 'generator.'; save only one" in error_of(base)


def test_another_model_is_said_in_one_line(base: Path):
    wrap(base, "transformer", lambda name: name.replace("_proj", "_linear").replace("norm", "n").replace("e", "E"))
    first, line = error_of(base).splitlines()
    assert "1 problem" in first
    assert "none of its 25 tensors belongs to this model: it has" in line
    assert "expected model.embed_tokens.weight" in line


def test_a_kind_of_problem_is_cut_short(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contents, "MAX_SHOWN", 8)
    wrap(base, "transformer", lambda name: name.replace("mlp", "m").replace("self_attn", "s"))
    lines = error_of(base).splitlines()
    assert "  " + f"{base / 'transformer'}: missing: and 10 more" in lines
    assert len(lines) == 1 + 2 * 9, lines


def move(new: str) -> Callable[[Path], None]:
    def edit(part: Path) -> None:
        (part / f"{STEM}.safetensors").rename(part / new)

    return edit


def shards(part: Path) -> None:
    move(f"{STEM}-00002-of-00003.safetensors")(part)


def hub_cache(part: Path) -> None:
    (part / f"{STEM}.safetensors").unlink()
    cache = part.parent / ".cache" / "huggingface" / "download" / "transformer"
    cache.mkdir(parents=True)
    (cache / "abc.def.incomplete").touch()


def empty(part: Path) -> None:
    (part / f"{STEM}.safetensors").write_bytes(b"")
    (part / f"{STEM}.safetensors.aria2").touch()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            move(f"{STEM}.fp16.safetensors"),
            f"The folder holds a variant, {STEM}.fp16.safetensors. Download the usual files",
        ),
        (move(f"{STEM}.bf16.bin"), f"mv {{0}}/{STEM}.bf16.bin {{0}}/{STEM}.bin"),
        (
            move(f"{STEM}.safetensors.index.fp16.json"),
            f"{STEM}.safetensors.index.fp16.json {{}}/{STEM}.safetensors.index",
        ),
        (shards, "The folder holds 1 of 3 shards, without their index. Download"),
        (shards, f"Download {STEM}.safetensors.index.json and the shards 1, 3."),
        (move(f"{STEM}.safetensors.part"), f"A download was interrupted ({STEM}.safetensors.part): run the same"),
        (hub_cache, "abc.def.incomplete): run the same download again"),
        (empty, "truncated or damaged, 0 bytes (Error while deserializing header: header too small). A download was"),
        (move("model.gguf"), "model.gguf cannot be read; convert or download the weights as .safetensors"),
    ],
)
def test_what_is_there_instead_of_weights_is_said(edit: Callable[[Path], None], said: str, base: Path):
    edit(base / "transformer")
    assert said.format(base / "transformer") in error_of(base)


def test_the_command_for_a_variant_works(base: Path):
    """The folder name has characters that are special in a shell or a pattern."""
    odd = base.with_name("it's [a] {b} $c #d é%20;\\ *")
    shutil.move(base, odd)
    before = load_folder(odd)
    move(f"{STEM}.fp16.safetensors")(odd / "transformer")
    command = error_of(odd).partition("or use the variant instead: ")[2]
    assert os.system(command.splitlines()[0]) == 0
    after = load_folder(odd)
    jax.tree.map(np.testing.assert_array_equal, after.transformer, before.transformer)
    save_folder(after, odd / "export [1]")
    load_folder(odd / "export [1]")

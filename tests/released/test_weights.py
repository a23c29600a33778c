"""The released folder format: what is loaded is saved bit for bit, in every dtype and file layout."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_copies as copies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_data import GoldenCase, first_case, golden_cases
from safetensors import safe_open

from udm_grpo.batches import Params
from udm_grpo.model import transformer
from udm_grpo.model.vq import codec as vq
from udm_grpo.released.weights import (
    ReleasedModel,
    Scheduler,
    WeightsError,
    load_folder,
    load_transformer,
    new_checkpoint,
    save_folder,
)

LAYOUTS: dict[str, Callable[[Path], None]] = {
    "float32": lambda folder: None,
    "bfloat16": functools.partial(copies.cast, dtype=torch.bfloat16),
    "float16": functools.partial(copies.cast, dtype=torch.float16),
    "mixed": copies.cast_some,
    "sharded": copies.shard,
    "bin": copies.as_bin,
    "legacy bin": functools.partial(copies.as_bin, legacy=True),
    "bfloat16 bin": copies.as_bfloat16_bin,
    "sharded bin": functools.partial(copies.shard, ending=".bin"),
}

ASSETS = Path(__file__).resolve().parents[2] / "udm_grpo" / "assets"


@functools.cache
def golden() -> ReleasedModel:
    return load_folder(first_case().checkpoint)


def assert_same_folder(found: Path, wanted: Path) -> None:
    """The same files; the same names, shapes, dtypes and bits of tensors; every other file the same bytes."""
    names = sorted(str(path.relative_to(wanted)) for path in wanted.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == names
    for name in names:
        if name.endswith(".json") and not name.endswith(".index.json"):
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
        if name.endswith(".index.json"):
            assert json.loads((found / name).read_text()) == json.loads((wanted / name).read_text())
    for part in (*copies.PARTS, "scheduler"):
        here, there = copies.read_state(found / part), copies.read_state(wanted / part)
        assert here.keys() == there.keys()
        for name, tensor in there.items():
            assert here[name].dtype == tensor.dtype, name
            assert here[name].shape == tensor.shape, name
            bits = torch.int16 if tensor.itemsize == 2 else torch.int32
            assert torch.equal(here[name].view(bits), tensor.view(bits)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_then_save_gives_back_every_bit(layout: str, tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    LAYOUTS[layout](folder)
    checkpoint = load_folder(folder)
    leaves = jax.tree.leaves((checkpoint.transformer, checkpoint.vq, checkpoint.path_codebook))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    save_folder(checkpoint, tmp_path / "export")
    assert_same_folder(tmp_path / "export", folder)


@golden_cases()
def test_the_golden_files_come_back_byte_for_byte(case: GoldenCase, tmp_path: Path):
    save_folder(load_folder(case.checkpoint), tmp_path / "export")
    for file in case.checkpoint.rglob("*"):
        if file.is_file() and file.suffix not in (".pth", ".bin"):  # torch writes ids into those
            assert (tmp_path / "export" / file.relative_to(case.checkpoint)).read_bytes() == file.read_bytes()


@golden_cases()
def test_every_array_has_the_shape_of_its_model(case: GoldenCase):
    checkpoint = load_folder(case.checkpoint)

    def forms(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    assert forms(checkpoint.transformer) == transformer.abstract(checkpoint.transformer_config)
    assert forms(checkpoint.vq) == vq.abstract(checkpoint.vq_config)
    assert checkpoint.path_codebook.shape[0] == checkpoint.transformer_config.lm_head_size
    given = checkpoint.scheduler
    assert (given.alpha, given.c, given.shift) == tuple(case.setup[name] for name in ("alpha", "c", "shift"))
    assert checkpoint.tokenizer.length == case.setup["L"]
    assert checkpoint.vq_config.attn_up_block == case.setup["attn"]


def test_linear_layers_are_transposed_and_layers_stacked():
    state = copies.read_state(first_case().checkpoint / "transformer")
    layers = golden().transformer_config.num_hidden_layers
    wanted = np.stack([state[f"model.layers.{i}.mlp.gate_proj.weight"].numpy().T for i in range(layers)])
    np.testing.assert_array_equal(golden().transformer["layers"]["mlp"]["gate"]["kernel"], wanted)


def test_trained_weights_are_saved_in_the_dtype_of_the_start(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    copies.cast(folder, torch.bfloat16)
    checkpoint = load_folder(folder)
    trained = jax.tree.map(lambda leaf: leaf * 1.1, checkpoint.transformer)
    save_folder(dataclasses.replace(checkpoint, transformer=trained), tmp_path / "export")
    found = copies.read_state(tmp_path / "export" / "transformer")
    before = copies.read_state(folder / "transformer")
    for name, tensor in before.items():
        assert torch.equal(found[name], (tensor.float() * 1.1).bfloat16()), name
    save_folder(dataclasses.replace(checkpoint, transformer=trained), tmp_path / "wide", dtype="float32")
    found = copies.read_state(tmp_path / "wide" / "transformer")
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"].float() * 1.1)
    assert copies.read_state(tmp_path / "wide" / "vae")["quant_conv.bias"].dtype == torch.bfloat16


def test_what_was_rounded_on_loading_is_saved_as_it_was_rounded(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    copies.change(folder, "vae", lambda state: state.update({"quant_conv.bias": state["quant_conv.bias"].double()}))
    half = load_folder(folder, dtype="bfloat16")
    assert half.transformer["norm"]["scale"].dtype == jnp.bfloat16
    save_folder(half, tmp_path / "half")
    wanted = copies.read_state(folder / "transformer")
    for name, tensor in copies.read_state(tmp_path / "half" / "transformer").items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name
    save_folder(load_folder(folder), tmp_path / "single")
    assert copies.read_state(tmp_path / "single" / "vae")["quant_conv.bias"].dtype == torch.float32


@golden_cases()
def test_one_transformer_file_can_be_read_alone(case: GoldenCase, tmp_path: Path):
    config = load_folder(case.checkpoint).transformer_config
    reference = load_transformer(case.reference, config)
    wanted = copies.load_file(case.reference)["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(reference["embed"]["embedding"], wanted)
    whole = load_transformer(case.checkpoint / "transformer", config)
    assert not np.array_equal(whole["embed"]["embedding"], wanted)
    with pytest.raises(WeightsError, match=r"wrong shape: lm_head.weight is"):
        load_transformer(case.reference, dataclasses.replace(config, hidden_size=config.hidden_size * 2))


def test_saving_replaces_an_older_export_even_where_it_was_loaded_from(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    (folder / "leftover.txt").write_text("of the older export")
    save_folder(load_folder(folder), folder)
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    assert_same_folder(folder, copies.copy_checkpoint(tmp_path / "another"))


def test_a_folder_without_model_index_loads(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    (folder / "model_index.json").unlink()
    save_folder(load_folder(folder), tmp_path / "export")
    assert_same_folder(tmp_path / "export", folder)


PUBLIC_CLASSES = {
    "_class_name": "URSAPipeline",
    "_diffusers_version": "0.35.1",
    "scheduler": ["diffnext.schedulers.scheduling_dfm", "KineticOptimalScheduler"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffnext.models.transformers.transformer_ursa", "URSATransformer3DModel"],
    "vae": ["diffnext.models.autoencoders.autoencoder_vq", "AutoencoderVQ"],
}
"""Where the public PyTorch code (diffnext, diffusers 0.35, transformers 4.57) finds the parts."""


def assert_names_public_classes(folder: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text()) == PUBLIC_CLASSES
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in config


@pytest.mark.parametrize("world", ["shapes", "signs"])
def test_the_shipped_bases_open_in_the_public_code(world: str):
    assert_names_public_classes(ASSETS / f"ursa-{world}")


def test_a_new_base_names_classes_that_transformers_4_has(tmp_path: Path):
    folder = shutil.copytree(first_case().checkpoint / "tokenizer", tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text()) | {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
    file.write_text(json.dumps(written))  # as transformers 5 saves it
    given = golden()
    trees = (given.transformer_config, given.transformer, given.vq_config, given.vq)
    save_folder(new_checkpoint(*trees, given.path_codebook, given.scheduler, folder), tmp_path / "new")
    assert_names_public_classes(tmp_path / "new")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", ["VQuantizer", "LFQuantizer"])
def test_a_new_checkpoint_is_a_released_one(quantizer: str, dtype: str, tmp_path: Path):
    tokenizer_folder = first_case().checkpoint / "tokenizer"
    words = golden().tokenizer.vocabulary
    config = transformer.TransformerConfig(32, 48, 2, 1, 2, 10000.0, words + 16, words, 16, 2)
    vq_config = vq.VQConfig(
        block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=16, vq_embed_dim=4, quantizer_name=quantizer
    )
    codebook = jax.random.normal(jax.random.key(0), (16, 3))
    params, vq_params = transformer.init(config, jax.random.key(1)), vq.init(vq_config, jax.random.key(2))
    scheduler = Scheduler(alpha=None, c=3.0, eps=1e-5, shift=1.5)
    made = new_checkpoint(config, params, vq_config, vq_params, codebook, scheduler, tokenizer_folder, dtype=dtype)
    save_folder(made, tmp_path / "new")
    found = load_folder(tmp_path / "new")
    assert (found.transformer_config, found.vq_config, found.scheduler) == (config, vq_config, scheduler)
    np.testing.assert_array_equal(found.path_codebook, codebook)
    saved = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), (params, vq_params))
    jax.tree.map(np.testing.assert_array_equal, (found.transformer, found.vq), saved)
    assert found.files == made.files
    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert index.keys() == json.loads((first_case().checkpoint / "model_index.json").read_text()).keys()
    for part in ("transformer", "vae", "scheduler"):
        ours, theirs = (
            json.loads(next((folder / part).glob("*config.json")).read_text())
            for folder in (tmp_path / "new", first_case().checkpoint)
        )
        assert ours.keys() == theirs.keys()
    with safe_open(copies.file_of(tmp_path / "new", "vae"), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_length_of_prompts(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_max_length": 131072}))
    assert load_folder(folder).tokenizer.length == 320
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "model_max_length"}))
    assert load_folder(folder).tokenizer.length == 320
    tokenizer = load_folder(folder, prompt_length=5).tokenizer
    assert tokenizer.length == 5
    assert tokenizer(["a red circle"]).shape == (1, 5)

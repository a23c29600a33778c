"""Released model folders are loaded and saved bit for bit, in every dtype and file layout."""

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
from udm_grpo.model.execution import TransformerConfig
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


def assert_same_folder(actual: Path, expected: Path) -> None:
    """Assert equal files: the same names, shapes, dtypes and bits of tensors, and the same bytes in other files."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(actual)) for path in actual.rglob("*") if path.is_file()) == names
    for name in names:
        if name.endswith(".json") and not name.endswith(".index.json"):
            assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
        if name.endswith(".index.json"):
            assert json.loads((actual / name).read_text()) == json.loads((expected / name).read_text())
    for part in (*copies.PARTS, "scheduler"):
        here, there = copies.read_state(actual / part), copies.read_state(expected / part)
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
    released = load_folder(folder)
    leaves = jax.tree.leaves((released.transformer, released.vq, released.path_codebook))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    save_folder(released, tmp_path / "export")
    assert_same_folder(tmp_path / "export", folder)


@golden_cases()
def test_the_golden_files_come_back_byte_for_byte(case: GoldenCase, tmp_path: Path):
    save_folder(load_folder(case.checkpoint), tmp_path / "export")
    for file in case.checkpoint.rglob("*"):
        if file.is_file() and file.suffix not in (".pth", ".bin"):  # torch writes ids into those
            assert (tmp_path / "export" / file.relative_to(case.checkpoint)).read_bytes() == file.read_bytes()


@golden_cases()
def test_every_array_has_the_shape_of_its_model(case: GoldenCase):
    released = load_folder(case.checkpoint)

    def forms(tree: Params) -> Params:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    assert forms(released.transformer) == transformer.abstract(released.transformer_config)
    assert forms(released.vq) == vq.abstract(released.vq_config)
    assert released.path_codebook.shape[0] == released.transformer_config.lm_head_size
    scheduler = released.scheduler
    assert (scheduler.alpha, scheduler.c, scheduler.shift) == tuple(
        case.setup[name] for name in ("alpha", "c", "shift")
    )
    assert released.tokenizer.length == case.setup["L"]
    assert released.vq_config.attn_up_block == case.setup["attn"]


def test_linear_layers_are_transposed_and_layers_stacked():
    state = copies.read_state(first_case().checkpoint / "transformer")
    layers = golden().transformer_config.num_hidden_layers
    expected = np.stack([state[f"model.layers.{i}.mlp.gate_proj.weight"].numpy().T for i in range(layers)])
    np.testing.assert_array_equal(golden().transformer["layers"]["mlp"]["gate"]["kernel"], expected)


def test_trained_weights_are_saved_in_the_dtype_of_the_start(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    copies.cast(folder, torch.bfloat16)
    released = load_folder(folder)
    trained = jax.tree.map(lambda leaf: leaf * 1.1, released.transformer)
    save_folder(dataclasses.replace(released, transformer=trained), tmp_path / "export")
    saved = copies.read_state(tmp_path / "export" / "transformer")
    before = copies.read_state(folder / "transformer")
    for name, tensor in before.items():
        assert torch.equal(saved[name], (tensor.float() * 1.1).bfloat16()), name
    save_folder(dataclasses.replace(released, transformer=trained), tmp_path / "wide", dtype="float32")
    saved = copies.read_state(tmp_path / "wide" / "transformer")
    assert torch.equal(saved["lm_head.weight"], before["lm_head.weight"].float() * 1.1)
    assert copies.read_state(tmp_path / "wide" / "vae")["quant_conv.bias"].dtype == torch.bfloat16


def test_what_was_rounded_on_loading_is_saved_as_it_was_rounded(tmp_path: Path):
    folder = copies.copy_checkpoint(tmp_path / "released")
    copies.change(folder, "vae", lambda state: state.update({"quant_conv.bias": state["quant_conv.bias"].double()}))
    half = load_folder(folder, dtype="bfloat16")
    assert half.transformer["norm"]["scale"].dtype == jnp.bfloat16
    save_folder(half, tmp_path / "half")
    before = copies.read_state(folder / "transformer")
    for name, tensor in copies.read_state(tmp_path / "half" / "transformer").items():
        assert torch.equal(tensor, before[name].bfloat16()), name
    save_folder(load_folder(folder), tmp_path / "single")
    assert copies.read_state(tmp_path / "single" / "vae")["quant_conv.bias"].dtype == torch.float32


@golden_cases()
def test_one_transformer_file_can_be_read_alone(case: GoldenCase, tmp_path: Path):
    config = load_folder(case.checkpoint).transformer_config
    reference = load_transformer(case.reference, config)
    expected = copies.load_file(case.reference)["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(reference["embed"]["embedding"], expected)
    whole = load_transformer(case.checkpoint / "transformer", config)
    assert not np.array_equal(whole["embed"]["embedding"], expected)
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
"""Classes by which the public PyTorch code (diffnext, diffusers 0.35, transformers 4.57) loads the parts."""


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
    released = golden()
    trees = (released.transformer_config, released.transformer, released.vq_config, released.vq)
    save_folder(new_checkpoint(*trees, released.path_codebook, released.scheduler, folder), tmp_path / "new")
    assert_names_public_classes(tmp_path / "new")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantizer", ["VQuantizer", "LFQuantizer"])
def test_a_new_checkpoint_is_a_released_one(quantizer: str, dtype: str, tmp_path: Path):
    tokenizer_folder = first_case().checkpoint / "tokenizer"
    words = golden().tokenizer.vocabulary
    config = TransformerConfig(32, 48, 2, 1, 2, 10000.0, words + 16, words, 16, 2)
    vq_config = vq.VQConfig(
        block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=16, vq_embed_dim=4, quantizer_name=quantizer
    )
    codebook = jax.random.normal(jax.random.key(0), (16, 3))
    params, vq_params = transformer.init(config, jax.random.key(1)), vq.init(vq_config, jax.random.key(2))
    scheduler = Scheduler(alpha=None, c=3.0, eps=1e-5, shift=1.5)
    new = new_checkpoint(config, params, vq_config, vq_params, codebook, scheduler, tokenizer_folder, dtype=dtype)
    save_folder(new, tmp_path / "new")
    loaded = load_folder(tmp_path / "new")
    assert (loaded.transformer_config, loaded.vq_config, loaded.scheduler) == (config, vq_config, scheduler)
    np.testing.assert_array_equal(loaded.path_codebook, codebook)
    saved = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), (params, vq_params))
    jax.tree.map(np.testing.assert_array_equal, (loaded.transformer, loaded.vq), saved)
    assert loaded.files == new.files
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

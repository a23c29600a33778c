"""Adapters in PEFT's format are read and written as PEFT itself does it, on the independent PyTorch model."""

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
from udm_grpo.model import lora
from udm_grpo.pipeline import Pipeline
from udm_grpo.released import peft_config
from udm_grpo.released.peft_files import merge_on_host, read_adapter, with_adapter, write_adapter
from udm_grpo.released.weights import ReleasedModel, WeightsError, load_folder

BASE = first_case().checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 3, 7.5


@pytest.fixture(scope="module")
def released() -> ReleasedModel:
    return load_folder(BASE)


def adapter_of(released: ReleasedModel, *patterns: str) -> Params:
    """Return an adapter that changes the logits a lot."""
    random = np.random.default_rng(0)
    form = lora.abstract(released.transformer_config, RANK, lora.targets(patterns))
    return jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), form)


@pytest.fixture(scope="module")
def folder(released: ReleasedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "adapter"
    write_adapter(path, adapter_of(released, "*_proj"), ALPHA)
    return path


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    arrays = first_case().arrays
    with torch.inference_mode():
        return model(*(torch.from_numpy(np.array(arrays[name])) for name in ("prompt_ids", "image_ids"))).numpy()


def our_logits(released: ReleasedModel, params: Params) -> np.ndarray:
    arrays = first_case().arrays
    pipeline = Pipeline(dataclasses.replace(released, transformer=params))
    return np.asarray(pipeline.logits(arrays["prompt_ids"], arrays["image_ids"]))


@pytest.mark.parametrize("patterns", [("*_proj",), ("q_proj", "v_proj", "down_proj")])
def test_peft_computes_what_we_do(patterns: tuple[str, ...], released: ReleasedModel, tmp_path: Path) -> None:
    adapter = adapter_of(released, *patterns)
    write_adapter(tmp_path / "adapter", adapter, ALPHA)
    expected = torch_logits(peft.PeftModel.from_pretrained(load_reference(BASE), tmp_path / "adapter"))
    attached = lora.attach(released.transformer, lora.scaled(adapter, ALPHA / RANK))
    assert_close(our_logits(released, attached), expected)
    merged = merge_on_host(released.transformer, adapter, ALPHA / RANK)
    assert_close(our_logits(released, merged), expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        with_adapter(released.transformer, tmp_path / "adapter", released.transformer_config),
        merged,
    )
    plain = our_logits(released, released.transformer)
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()


def test_there_and_back(folder: Path, released: ReleasedModel, tmp_path: Path) -> None:
    adapter, alpha = read_adapter(folder, released.transformer_config)
    assert alpha == ALPHA
    jax.tree.map(np.testing.assert_array_equal, adapter, adapter_of(released, "*_proj"))
    # The adapter that PEFT itself saves is read as well.
    peft.PeftModel.from_pretrained(load_reference(BASE), folder).save_pretrained(tmp_path)
    saved, alpha = read_adapter(tmp_path, released.transformer_config)
    assert alpha == ALPHA
    jax.tree.map(np.testing.assert_array_equal, saved, adapter)


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


def nested(folder: Path) -> None:
    for name in ("default", "second"):
        shutil.copytree(folder, folder / name, ignore=shutil.ignore_patterns("default"))
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).unlink()


def two_files(folder: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) * 2 for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(tensors, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json: cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("["), "adapter_config.json: is not JSON"),
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors: no such file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "truncated or damaged, 99 bytes"),
        (set_fields(peft_type="IA3"), "peft_type is 'IA3'; expected 'LORA'"),
        (set_fields(r=True), "r is True; expected a whole number above 0"),
        (set_fields(lora_alpha="2"), "lora_alpha is '2'; expected a number above 0"),
        (set_fields(use_dora=True, bias="all"), "bias is 'all', which is not supported (the biases of the base"),
        (
            set_fields(init_lora_weights="pissa_niter_4"),
            "init_lora_weights is 'pissa_niter_4': that initialisation",
        ),
        (set_fields(init_lora_weights="lora_ga"), "which makes it a plain LoRA, or merge that adapter with PEFT"),
        (
            set_fields(new_trick={"x": 1}, peft_version="9.9"),
            "new_trick is {'x': 1}, an unknown field",
        ),
        (
            set_fields(rank_pattern={"q_proj": "2"}),
            "rank_pattern is {'q_proj': '2'}; expected an object of module name patterns",
        ),
        (set_fields(alpha_pattern={"(": 2}), "alpha_pattern: '(' is not a regular expression"),
        (set_fields(target_modules=["q_proj", 3]), "target_modules is ['q_proj', 3]; expected names"),
        (set_fields(layers_to_transform=["0"]), "layers_to_transform is ['0']; expected layer numbers"),
        (set_fields(layer_replication=[[0, 2]]), "layer_replication is [[0, 2]], which is not supported"),
        (set_fields(trainable_token_indices=[1]), "rows of the embedding were trained as well"),
        (set_fields(r=4), "q_proj.lora_A.weight is (3, 64), expected (4, 64)"),
        (set_fields(r=65), "the rank is 65, more than the smaller side of q_proj is 64 x"),
        (rename("layers.1.mlp.up", "layers.9.mlp.up"), "not known: base_model.model.model.layers.9.mlp.up_proj.lora_A"),
        (rename("layers.1.mlp.up", "layers.9.mlp.up"), "missing: base_model.model.model.layers.1.mlp.up_proj.lora_B"),
        (
            rename("_proj", "_projection"),
            "no tensor of the adapter belongs to this model: 28 tensor(s) that are not read: not known",
        ),
        (rename("0.mlp.up_proj.lora_A.weight", "0.mlp.up_proj.lora_magnitude_vector"), "not read: DoRA's magnitudes"),
        (rename("layers.1.mlp.up_proj.lora_A", "layers.1.mlp.up_proj.lora_A.second"), "tensors of several adapters"),
        (rename("model.layers.1", "other.layers.1"), "tensors of several prefixes"),
        (rename("lora_A", "lora.down"), "the old names of diffusers"),
        (
            lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_lora_weights.safetensors"),
            "was written by diffusers",
        ),
        (nested, "adapters are in the folder(s) default, second: give one of them"),
        (two_files, "adapter_model.safetensors and adapter_model.bin hold different weights"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    edit: Callable[[Path], None], said: str, folder: Path, released: ReleasedModel, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "adapter")
    edit(tmp_path / "adapter")
    with pytest.raises(WeightsError) as caught:
        read_adapter(tmp_path / "adapter", released.transformer_config)
    assert said in str(caught.value)


NAMES = {
    "the adapter's name": (".weight", ".default.weight"),
    "torch.compile": ("base_model.model.", "base_model.model._orig_mod."),
    "DDP": ("base_model.", "module.base_model."),
    "FSDP": ("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "no prefix": ("base_model.model.", ""),
    "another part": ("base_model.model.", "transformer."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_scheme_of_names_is_read(kind: str, folder: Path, released: ReleasedModel, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "adapter")
    rename(*NAMES[kind])(tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / WEIGHTS)) != set(load_file(folder / WEIGHTS))
    adapter, _ = read_adapter(tmp_path / "adapter", released.transformer_config)
    jax.tree.map(np.testing.assert_array_equal, adapter, adapter_of(released, "*_proj"))


def test_an_old_bin_file_is_read(folder: Path, released: ReleasedModel, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "adapter")
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    for _ in range(2):  # beside the newer file, and alone
        adapter, _alpha = read_adapter(tmp_path / "adapter", released.transformer_config)
        jax.tree.map(np.testing.assert_array_equal, adapter, adapter_of(released, "*_proj"))
        (tmp_path / "adapter" / WEIGHTS).unlink(missing_ok=True)


SETTINGS = {
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "up_proj": 1},
        "alpha_pattern": {r"layers\.1\..*_proj": 7},
    },
    "some layers": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "expressions": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*layers\.0\.(self_attn|mlp)\.\w+_proj",
        "exclude_modules": ["k_proj"],
        "use_rslora": True,
        "rank_pattern": {"gate_proj": 3},
    },
    "orthogonal": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_fields_that_change_the_result_are_understood(kind: str, released: ReleasedModel, tmp_path: Path) -> None:
    """PEFT creates the adapter, saves it and adds it to the PyTorch model; our merged model gives the same logits."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load_reference(BASE), peft.LoraConfig(**SETTINGS[kind]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    model.eval()
    merged = with_adapter(released.transformer, tmp_path, released.transformer_config)
    assert_close(our_logits(released, merged), torch_logits(model))


def test_every_field_of_peft_has_a_place() -> None:
    """A field that a newer PEFT adds has to be put into one of the three groups."""
    placed = {*peft_config.UNDERSTOOD, *peft_config.NO_DIFFERENCE, *peft_config.REFUSED}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= placed


def test_nothing_else_is_overwritten(released: ReleasedModel, folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(released, "q_proj")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds no adapter_config\.json"):
        write_adapter(tmp_path, adapter, ALPHA)
    shutil.copytree(folder, tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", adapter, 3.0)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["target_modules"], config["lora_alpha"], config["r"]) == (["q_proj"], 3, 3)

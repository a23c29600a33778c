"""Read and write a low-rank adapter as a PEFT folder: adapter_model.safetensors and adapter_config.json.

`PeftModel.from_pretrained(model, folder)` adds it to a PyTorch model whose parameters are named as in a released file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from udm_grpo.batches import Params
from udm_grpo.files.atomic import replacing_folder
from udm_grpo.files.finite import named, nonfinite
from udm_grpo.model import lora, transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.released.contents import PathLike, Problems
from udm_grpo.released.part_files import different_files
from udm_grpo.released.peft_config import CONFIG_FILE, AdapterConfig, read_config
from udm_grpo.released.peft_names import AdapterNames, Factor, read_names
from udm_grpo.tensor_files.torch_files import Layout, WeightsError, open_tensors, read_json, write_file, write_tensors
from udm_grpo.tensor_files.weight_table import (
    KERNEL,
    Source,
    Table,
    TensorInfo,
    from_tree,
    leaves_by_path,
    problems,
    sources,
)

WEIGHTS_FILE, OLD_WEIGHTS_FILE = "adapter_model.safetensors", "adapter_model.bin"
UNNAMED_FILE = "pytorch_lora_weights.safetensors"
"""File that diffusers writes instead, without an adapter_config.json."""
PREFIX = "base_model.model.model.layers.{layer}"
PEFT_TABLE: Table = (
    ("layers/attn/{name}/lora_a", PREFIX + ".self_attn.{name}_proj.lora_A.weight", KERNEL),
    ("layers/attn/{name}/lora_b", PREFIX + ".self_attn.{name}_proj.lora_B.weight", KERNEL),
    ("layers/mlp/{name}/lora_a", PREFIX + ".mlp.{name}_proj.lora_A.weight", KERNEL),
    ("layers/mlp/{name}/lora_b", PREFIX + ".mlp.{name}_proj.lora_B.weight", KERNEL),
)
"""In the form of TRANSFORMER_TABLE."""
NOT_USED: Mapping[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Fields of adapter_config.json for features that adapters written here do not have."""


def write_adapter(folder: PathLike, adapter: Params, alpha: float) -> None:
    """Write an adapter, to which `lora.scaled` was not applied, in float32.

    Raises WeightsError for numbers that are not finite, FileExistsError rather than overwrite anything but an adapter,
    and OSError if the disk is full.
    """
    tensors = sources(PEFT_TABLE, adapter)
    infos = {name: TensorInfo(tensors[name].shape, "float32") for name in sorted(tensors)}
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in leaves_by_path(adapter).items()}
    if bad := nonfinite({name: leaves[source.path] for name, source in tensors.items()}):
        raise WeightsError(f"{folder} was not written: NaN or infinite numbers in {named(bad)}.")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,  # PEFT would look up a folder name on the hub
        "inference_mode": True,
        "r": next(iter(leaves.values())).shape[-1],  # of lora_a, which comes before lora_b
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": [name for name in lora.MAPS if any(f".{name}." in info for info in infos)],
        **NOT_USED,
    }
    layout = Layout({WEIGHTS_FILE: tuple(infos)}, dict.fromkeys(infos, "float32"), {WEIGHTS_FILE: {"format": "pt"}})
    with replacing_folder(Path(folder), CONFIG_FILE) as fresh:
        write_file(fresh / CONFIG_FILE, [json.dumps(config, indent=2).encode() + b"\n"])
        write_tensors(fresh, layout, infos, lambda name: [from_tree(tensors[name], leaves)])


def read_adapter(folder: PathLike, config: TransformerConfig) -> tuple[Params, float]:
    """Return (adapter in float32 on the host, alpha) of a PEFT folder, with the highest rank that any of its maps has.

    Settings of single modules (rank_pattern, alpha_pattern), use_rslora and layers that are not adapted are part of the
    values: matrices are padded with zeros, and B is scaled so that alpha / rank is right for all.
    Raises WeightsError listing every problem: a damaged file, another kind of adapter, an adapter of another model.
    """
    folder, errors = Path(folder), Problems()
    raw = errors.collect(lambda: read_json(_file(folder, CONFIG_FILE)))
    opened = errors.collect(lambda: open_tensors(_weights_file(folder)))
    fields = None if raw is None else read_config(raw, errors.lines)
    names = None if opened is None else read_names(opened.infos)
    if names:
        errors.lines += [f"{WEIGHTS_FILE}: {line}" for line in (names.unknown if names.tensors else ())]
    errors.raise_any(folder)
    assert fields
    assert opened
    assert names
    maps = tuple(name for name in lora.MAPS if any(factor.map == name for factor in names.tensors))
    if not maps:
        some = "; ".join(names.unknown) or "nothing"
        expected = next(iter(sources(PEFT_TABLE, lora.abstract(config, 1, ("q_proj",)))))
        raise WeightsError(f"{folder}: no tensor of the adapter belongs to this model: {some}; expected {expected}")
    layers = range(config.num_hidden_layers)
    ranks = [fields.rank_of(names.module(layer, name)) for layer in layers for name in maps]
    form = errors.collect(lambda: lora.abstract(config, max(ranks), maps))
    if form is not None:
        errors.lines += _tensor_problems(names, fields, config, opened.infos, maps)
    errors.raise_any(folder)
    assert form is not None
    bad: list[str] = []
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), form)
    for factor, name in names.tensors.items():
        part, linear = lora.MAPS[factor.map]
        module = names.module(factor.layer, factor.map)
        block = opened.read(name).astype(np.float32).T
        if factor.side == "B":
            by = fields.scaling(module) * max(ranks) / fields.alpha
            block = block if by == 1 else block * by
            adapter["layers"][part][linear]["lora_b"][factor.layer, : len(block)] = block
        else:
            adapter["layers"][part][linear]["lora_a"][factor.layer, :, : block.shape[1]] = block
        bad += [] if np.isfinite(block).all() else [name]
    if bad:
        raise WeightsError(f"{folder}: numbers that are NaN, infinite or too large for float32 in {named(bad)}")
    return adapter, fields.alpha


def with_adapter(base: Params, folder: PathLike, config: TransformerConfig) -> Params:
    """Return float32 weights on the host with the adapter of a PEFT folder merged in; raises as `read_adapter` does."""
    adapter, alpha = read_adapter(folder, config)
    rank = jax.tree.leaves(adapter)[0].shape[-1]
    return merge_on_host(base, adapter, alpha / rank)


def merge_on_host(base: Params, adapter: Params, factor: float) -> Params:
    """Return float32 weights on the host: the base with W + factor A B for every adapted W, computed in float32."""
    wide, both = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree) for tree in (base, adapter))
    return lora.merge(wide, lora.scaled(both, factor))


def _file(folder: Path, name: str) -> Path:
    """Return the path of an adapter's file. Raises WeightsError saying what is in the folder instead."""
    if (folder / name).is_file() or not folder.is_dir():
        return folder / name
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if below:
        raise WeightsError(f"{name} is missing; adapters are in the folder(s) {', '.join(below)}: give one of them")
    if (folder / UNNAMED_FILE).is_file():
        raise WeightsError(
            f"{UNNAMED_FILE} was written by diffusers, without the {CONFIG_FILE} that holds alpha; save the adapter "
            "with PEFT's save_pretrained"
        )
    return folder / name


def _weights_file(folder: Path) -> Path:
    """Return the file with the matrices.

    It is the file of PEFT before 0.7 if there is no newer one. Raises WeightsError if both exist and differ.
    """
    new, old = folder / WEIGHTS_FILE, folder / OLD_WEIGHTS_FILE
    if new.is_file() and old.is_file() and (problem := different_files(new, old)):
        raise WeightsError(problem)
    return old if old.is_file() and not new.is_file() else _file(folder, WEIGHTS_FILE)


def _tensor_problems(
    names: AdapterNames,
    fields: AdapterConfig,
    config: TransformerConfig,
    infos: Mapping[str, TensorInfo],
    maps: Sequence[str],
) -> list[str]:
    """Return a line for every matrix that is missing, superfluous, misshapen or not of a floating-point dtype."""
    expected: dict[str, Source] = {}
    layers = transformer.abstract(config)["layers"]
    for name in maps:
        part, linear = lora.MAPS[name]
        _, d_in, d_out = layers[part][linear]["kernel"].shape
        for layer in range(config.num_hidden_layers):
            module = names.module(layer, name)
            rank = fields.rank_of(module)
            shapes = {"A": (rank, d_in), "B": (d_out, rank)}
            factors = {side: Factor(layer, name, side) for side in shapes}
            if fields.adapts(module, layer) or any(factor in names.tensors for factor in factors.values()):
                expected |= {names.saved(factors[side]): Source("", None, KERNEL, shapes[side]) for side in shapes}
    read = {name: infos[name] for name in names.tensors.values()}
    return [f"{WEIGHTS_FILE}: {line}" for line in problems(expected, read)]

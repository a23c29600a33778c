"""The folder of a low-rank adapter as PEFT reads and writes it: adapter_model.safetensors and adapter_config.json.

`PeftModel.from_pretrained(model, folder)` adds it to a PyTorch model whose parameters are named as in a released file.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from udm_grpo.batches import Params
from udm_grpo.host.atomic import replacing_folder
from udm_grpo.host.released import PathLike, Problems
from udm_grpo.host.streaming import read_tree
from udm_grpo.host.torch_files import Layout, WeightsError, open_tensors, read_json, write_file, write_tensors
from udm_grpo.host.weight_table import KERNEL, Table, TensorInfo, from_tree, leaves_by_path, problems, sources
from udm_grpo.model import lora
from udm_grpo.model.transformer import TransformerConfig

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.{layer}"
PEFT_TABLE: Table = (
    ("layers/attn/{name}/lora_a", PREFIX + ".self_attn.{name}_proj.lora_A.weight", KERNEL),
    ("layers/attn/{name}/lora_b", PREFIX + ".self_attn.{name}_proj.lora_B.weight", KERNEL),
    ("layers/mlp/{name}/lora_a", PREFIX + ".mlp.{name}_proj.lora_A.weight", KERNEL),
    ("layers/mlp/{name}/lora_b", PREFIX + ".mlp.{name}_proj.lora_B.weight", KERNEL),
)
"""As TRANSFORMER_TABLE."""
UNUSED: Mapping[str, Any] = {
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
"""Fields of adapter_config.json for what no adapter here has, with the value (or one that is as empty) that says so."""


def write_adapter(folder: PathLike, adapter: Params, alpha: float) -> None:
    """Write an adapter (not `scaled`) in float32.

    Raises FileExistsError rather than overwrite anything but an adapter, and OSError if the disk is full.
    """
    wanted = sources(PEFT_TABLE, adapter)
    infos = {name: TensorInfo(wanted[name].shape, "float32") for name in sorted(wanted)}
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in leaves_by_path(adapter).items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,  # PEFT would take the name of a folder for one on the hub, and ask there
        "inference_mode": True,
        "r": next(iter(leaves.values())).shape[-1],  # of lora_a, which comes before lora_b
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": list(_names(infos)),
        **UNUSED,
    }
    layout = Layout({WEIGHTS_FILE: tuple(infos)}, dict.fromkeys(infos, "float32"), {WEIGHTS_FILE: {"format": "pt"}})
    with replacing_folder(Path(folder), CONFIG_FILE) as fresh:
        write_file(fresh / CONFIG_FILE, [json.dumps(config, indent=2).encode() + b"\n"])
        write_tensors(fresh, layout, infos, lambda name: [from_tree(wanted[name], leaves)])


def read_adapter(folder: PathLike, config: TransformerConfig) -> tuple[Params, float]:
    """Return (adapter in float32 on the host, alpha) of a PEFT folder.

    Raises WeightsError that lists every problem: a damaged file, another kind of adapter, one of another model.
    """
    folder, found = Path(folder), Problems()
    raw = found.collect(lambda: read_json(folder / CONFIG_FILE))
    opened = found.collect(lambda: open_tensors(folder / WEIGHTS_FILE))
    if raw is not None:
        found.lines += _config_problems(raw)
    found.raise_any(folder)
    assert raw is not None
    assert opened is not None
    names = _names(opened.infos)
    if not names:
        some = ", ".join(list(opened.infos)[:3]) or "nothing"
        wanted_name = next(iter(sources(PEFT_TABLE, lora.abstract(config, 1, ("q_proj",)))))
        raise WeightsError(f"{folder / WEIGHTS_FILE} adapts nothing of this model: found {some}; wanted {wanted_name}")
    form = found.collect(lambda: lora.abstract(config, raw["r"], names))
    if form is not None:
        found.lines += [f"{WEIGHTS_FILE}: {line}" for line in problems(sources(PEFT_TABLE, form), opened.infos)]
    found.raise_any(folder)
    assert form is not None
    wanted = sources(PEFT_TABLE, form)
    adapter = read_tree(wanted, form, opened.read_rows, jnp.dtype(jnp.float32))
    return jax.tree.map(np.asarray, adapter), float(raw["lora_alpha"])


def with_adapter(base: Params, folder: PathLike, config: TransformerConfig) -> Params:
    """Return float32 weights on the host with the adapter of a PEFT folder merged in; raises as `read_adapter`."""
    adapter, alpha = read_adapter(folder, config)
    rank = jax.tree.leaves(adapter)[0].shape[-1]
    return merge_on_host(base, adapter, alpha / rank)


def merge_on_host(base: Params, adapter: Params, factor: float) -> Params:
    """Return float32 weights on the host: the base with W + factor A B for every adapted W, computed in float32."""
    wide, both = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree) for tree in (base, adapter))
    return lora.merge(wide, lora.scaled(both, factor))


def _names(infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The linear maps (q_proj) that tensors are of, in the order of lora.MAPS."""
    found = {match[1] for name in infos if (match := re.search(r"\.(\w+)\.lora_[AB]\.weight$", name))}
    return tuple(name for name in lora.MAPS if name in found)


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    lines = []
    if raw.get("peft_type") != "LORA":
        lines.append(f"{CONFIG_FILE}: peft_type is {raw.get('peft_type')!r}; wanted 'LORA'")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        lines.append(f"{CONFIG_FILE}: r is {rank!r}; wanted a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        lines.append(f"{CONFIG_FILE}: lora_alpha is {alpha!r}; wanted a number above 0")
    for name, usual in UNUSED.items():
        value = raw.get(name)
        if value and value != usual:
            lines.append(f"{CONFIG_FILE}: {name} is {value!r}, which is not supported; merge that adapter with PEFT")
    return lines

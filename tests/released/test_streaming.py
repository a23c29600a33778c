"""Weights are read from files to shards and written back on any mesh, within the documented memory.

Run as a program (`python test_streaming.py WHAT folder ...`) this file is a process of its own tests.
"""

import ctypes
import gc
import json
import struct
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from checkpoint_helpers import finish, run_file
from golden_data import first_case

from udm_grpo import mesh as meshes
from udm_grpo.model import transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.multihost import hosts
from udm_grpo.released.weights import load_folder, load_transformer, save_folder
from udm_grpo.tensor_files import streaming
from udm_grpo.tensor_files.torch_files import open_tensors, write_tensors
from udm_grpo.tensor_files.weight_table import TRANSFORMER_TABLE, sources

FILE = "diffusion_pytorch_model.safetensors"
BOUND = 1.3
"""Peak memory of a load or an export on top of the local shards, in units of the largest tensor."""
ELSE = 24 << 20
"""Additional bytes that the interpreter, the allocator and compiled programs may take."""


def test_eight_devices_hold_what_one_does_and_export_it(tmp_path):
    assert "as on one" in finish(run_file(__file__, "MESHES", str(tmp_path), devices=8))


def on_meshes(folder: str) -> None:
    """Load to every mesh in blocks of a few rows; each shard must equal its part of the whole."""
    streaming.BLOCK_BYTES = 1 << 14
    base = load_folder(first_case().checkpoint)
    for sizes in ((8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)):
        mesh = meshes.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        shardings = meshes.shardings(mesh, base.transformer)
        config = base.transformer_config
        params = load_transformer(first_case().checkpoint / "transformer", config, shardings=shardings)

        def compare(leaf: jax.Array, whole: jax.Array, sharding: Any) -> None:
            assert leaf.sharding == sharding
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])

        jax.tree.map(compare, params, base.transformer, shardings)
    export = load_folder(first_case().checkpoint, read_transformer=False)
    export.transformer.update(params)
    save_folder(export, Path(folder) / "export", fetch=hosts.block)
    name = Path("transformer") / FILE
    assert (Path(folder) / "export" / name).read_bytes() == (first_case().checkpoint / name).read_bytes()
    print("as on one")


def synthetic(folder: Path, megabytes: int) -> TransformerConfig:
    """Write a bfloat16 transformer of about this size block by block, more than half of it in one tensor."""
    hidden, layers = 512, 4
    fixed = layers * (4 * 512 * 512 + 3 * 512 * 2048)
    codes = 1024
    vocabulary = (megabytes * 2**19 - fixed) // hidden - codes
    config = TransformerConfig(
        hidden_size=hidden,
        intermediate_size=2048,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        rope_theta=1e6,
        vocab_size=vocabulary,
        lm_vocab_size=vocabulary - codes,
        lm_head_size=codes,
        bov_token_id=0,
    )
    tensors = sources(TRANSFORMER_TABLE, transformer.abstract(config))
    at = 0
    header: dict[str, Any] = {}
    for name, source in tensors.items():
        size = int(np.prod(source.shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(source.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    pattern = np.arange(1 << 20, dtype=np.float32).astype(ml_dtypes.bfloat16).tobytes()
    folder.mkdir(parents=True)
    with (folder / FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(pattern)):
            file.write(pattern[: min(len(pattern), at - start)])
    return config


def high_water() -> int:
    """Return the peak memory of this process in bytes since `forget_high_water`.

    getrusage is not used, because a new process inherits its number from the process that started it.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_high_water() -> None:
    """Reset the peak, so that temporary memory of imports, such as compiling modules, does not hide what follows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise a load reuses freed memory and does not grow
    Path("/proc/self/clear_refs").write_text("5")


def measured(folder: str, megabytes: int = 160) -> dict[str, float]:
    """Load and export a synthetic transformer; return sizes and peaks in MiB."""
    config = synthetic(Path(folder) / "source", megabytes)
    mesh = meshes.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    abstract = transformer.abstract(config)
    jax.block_until_ready(jnp.zeros(8) + 1)  # starts the device and its threads
    forget_high_water()
    before = high_water()
    params = load_transformer(Path(folder) / "source", config, shardings=meshes.shardings(mesh, abstract))
    loaded = high_water()
    opened = open_tensors(Path(folder) / "source" / FILE)
    tensors, leaves = sources(TRANSFORMER_TABLE, abstract), streaming.leaves_by_path(params)

    def blocks(name: str) -> Any:
        rows = streaming.row_blocks(tensors[name], leaves[tensors[name].path], hosts.block)
        return (block.astype(ml_dtypes.bfloat16) for block in rows)

    (Path(folder) / "export").mkdir()
    write_tensors(Path(folder) / "export", opened.layout, opened.infos, blocks)
    exported = high_water()
    file = "diffusion_pytorch_model.safetensors"
    assert (Path(folder) / "export" / file).read_bytes()[-4096:] == (Path(folder) / "source" / file).read_bytes()[
        -4096:
    ]
    sizes = [int(np.prod(info.shape)) * 2 for info in opened.infos.values()]
    local = sum(shard.data.nbytes for leaf in leaves.values() for shard in leaf.addressable_shards)
    numbers = {"largest": max(sizes), "file": sum(sizes), "local": local}
    return {
        name: value / 2**20
        for name, value in (numbers | {"load": loaded - before, "export": exported - before}).items()
    }


def test_loading_and_exporting_need_the_local_shards_and_little_more(tmp_path):
    """Measured in a fresh process; the largest tensor counts with its size in the file."""
    sizes = json.loads(finish(run_file(__file__, "MEASURE", str(tmp_path), "160")).splitlines()[-1])
    assert sizes["largest"] > 0.5 * sizes["file"]
    allowed = sizes["local"] + BOUND * sizes["largest"] + ELSE / 2**20
    assert sizes["local"] < sizes["load"] <= sizes["export"] < allowed, sizes


if __name__ == "__main__":
    if sys.argv[1] == "MESHES":
        on_meshes(sys.argv[2])
    else:
        print(json.dumps(measured(sys.argv[2], int(sys.argv[3]))))

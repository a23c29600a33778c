"""Arrays and values that processes share, checkpoints that move between them, and weights that stream to shards.

Run as a program (`python test_hosts.py WHAT folder ...`) this file is one process of its own tests.
"""

import contextlib
import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import assert_same, change_a_number, finish, run_file
from golden_data import first_case
from running import free_port

from udm_grpo import mesh as meshes
from udm_grpo.checkpoints.checkpoint import Checkpoints, restore
from udm_grpo.checkpoints.checkpoint_fallback import restore_or_older
from udm_grpo.config import ConfigError, DistributedConfig, RunConfig
from udm_grpo.lifecycle import output_folder
from udm_grpo.multihost import hosts
from udm_grpo.multihost.distributed import joined
from udm_grpo.released.weights import load_folder, load_transformer, save_folder
from udm_grpo.tensor_files import streaming

ROWS = 8


def params_of(step: int) -> dict[str, Any]:
    """Return parameters whose numbers show their positions, under names that the mesh's rules know."""
    shapes = {"embed": {"embedding": (8, 16)}, "layers": {"mlp": {"up": {"kernel": (2, 8, 256)}}}, "norm": (6,)}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    numbers = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1000 * step for shape in leaves]
    return jax.tree.unflatten(tree, numbers)


def on(mesh: Any, params: Any) -> Any:
    """Return their shapes with shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        meshes.shardings(mesh, params),
    )


def exchange(mesh: Any) -> None:
    """Test every function of udm_grpo/multihost/hosts.py, on rows that are spread over the processes."""
    me, spread = jax.process_index(), meshes.over_batch(mesh)
    rows = hosts.owned_rows(spread, ROWS)
    assert rows.tolist() == [4 * me, 4 * me + 1, 4 * me + 2, 4 * me + 3]
    array = hosts.put_rows(lambda mine: np.asarray(mine)[:, None] * np.ones(3), ROWS, spread)
    np.testing.assert_array_equal(hosts.whole(array), np.arange(ROWS)[:, None] * np.ones(3))
    np.testing.assert_array_equal(hosts.take(array, rows), rows[:, None] * np.ones(3))
    np.testing.assert_array_equal(hosts.whole(hosts.put(np.arange(ROWS), spread)), np.arange(ROWS))
    assert hosts.gather({"process": me, "text": "ü" * me}) == [{"process": 0, "text": ""}, {"process": 1, "text": "ü"}]
    assert hosts.from_primary(lambda: f"of {me}") == "of 0"
    assert [hosts.any_process(me == 1), hosts.any_process(False)] == [True, False]
    third = np.float32(1) / 3
    columns = hosts.gather_rows({"score": rows.astype(np.float32) * third}, rows, ROWS)
    np.testing.assert_array_equal(columns["score"], np.arange(ROWS, dtype=np.float32) * third)
    only = hosts.gather_rows({"score": np.ones(ROWS, np.float32)} if me else {}, np.arange(ROWS if me else 0), ROWS)
    np.testing.assert_array_equal(only["score"], 1)


def move(mesh: Any, folder: Path) -> None:
    """Continue from what one process saved, and save asynchronously while the arrays are donated."""
    state, meta = restore(folder / "checkpoints" / "00000001", on(mesh, params_of(1)))
    assert meta == {"by": "one"}
    shards = state["layers"]["mlp"]["up"]["kernel"].addressable_shards
    assert sum(shard.data.size for shard in shards) == 2 * 8 * 256 // 2, "a process holds half of it"
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    forward = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1000, tree), donate_argnums=0)
    for step in (2, 3, 4):
        state = forward(state)
        checkpoints.begin(step, state, {"by": "two"})
    checkpoints.begin_best(4, forward(state), {"by": "two"})
    checkpoints.finish()


def go_back(mesh: Any, folder: Path) -> None:
    """Fall back from a copy of the newest checkpoint with one changed byte to the checkpoint before it."""
    copies = folder / "copies"
    if hosts.is_primary():
        for step in (3, 4):
            shutil.copytree(folder / "checkpoints" / f"{step:08d}", copies / f"{step:08d}")
        change_a_number(copies / "00000004", params_of(4)["layers"]["mlp"]["up"]["kernel"][0, 0, :4])
    hosts.any_process(False)  # a barrier: no process reads before the copies are complete
    state, _ = restore_or_older(copies / "00000004", on(mesh, params_of(1)), "latest", lambda meta: None)
    mine = state["norm"].addressable_shards[0].data
    np.testing.assert_array_equal(np.asarray(mine), params_of(3)["norm"])


def stream(mesh: Any, folder: Path) -> None:
    """Read a released folder to the shards of both processes, and write it from there."""
    base = load_folder(first_case().checkpoint, read_transformer=False)
    shardings = meshes.shardings(mesh, base.transformer)
    params = load_transformer(first_case().checkpoint / "transformer", base.transformer_config, shardings=shardings)
    assert not params["embed"]["embedding"].is_fully_addressable
    export = dataclasses.replace(base, transformer=params)
    save_folder(export, folder / "export", fetch=hosts.block, write=hosts.is_primary())


def open_folder_of_its_own(folder: Path) -> None:
    """Test that all processes refuse a run's folder that each has for itself."""
    output_folder.SEEN_WITHIN_S = 0.5
    own = RunConfig(output_dir=str(folder / f"own-{jax.process_index()}"))
    with pytest.raises(ConfigError, match=r"own-\d is not the same folder for all: process\(es\) 1 do not see what"):
        output_folder.claim_output(own, contextlib.ExitStack())
    assert not Path(own.output_dir).exists()
    shared = RunConfig(output_dir=str(folder / "shared"))
    assert output_folder.claim_output(shared, contextlib.ExitStack()) is None
    assert (folder / "shared").is_dir()


def together(folder: str, port: str, process: str) -> None:
    with joined(DistributedConfig(f"127.0.0.1:{port}", 2, int(process), 60.0, 60.0)):
        mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
        exchange(mesh)
        open_folder_of_its_own(Path(folder))
        move(mesh, Path(folder))
        go_back(mesh, Path(folder))
        streaming.BLOCK_BYTES = 1 << 12  # several blocks a tensor
        stream(mesh, Path(folder))


def test_two_processes_share_rows_checkpoints_and_weights(tmp_path):
    Checkpoints(tmp_path / "checkpoints", keep=9).save(1, jax.tree.map(jnp.asarray, params_of(1)), {"by": "one"})
    port = free_port()
    processes = [run_file(__file__, "TOGETHER", str(tmp_path), str(port), str(i), devices=2) for i in range(2)]
    for output in [finish(process) for process in processes]:
        assert re.search(r"00000004 is damaged: state/\S+ has other content than was saved\n", output)
        assert f"Going back to {tmp_path / 'copies' / '00000003'}." in output
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.steps() == [3, 4]
    for step in (3, 4):
        state, meta = checkpoints.restore(step, params_of(0))
        assert_same(state, params_of(step))
        assert meta == {"by": "two"}
    assert_same(checkpoints.restore(checkpoints.best(), params_of(0))[0], params_of(5))
    base, export = load_folder(first_case().checkpoint), load_folder(tmp_path / "export")
    assert_same(jax.tree.map(np.asarray, export.transformer), jax.tree.map(np.asarray, base.transformer))
    assert export.files == base.files


if __name__ == "__main__":
    together(*sys.argv[2:])

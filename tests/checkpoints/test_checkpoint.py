"""Tests of checkpoints: exact round trips, also onto other devices; which ones are kept; which one resume selects.

Run as a program (`python test_checkpoint.py folder`), this file is the 8-device process of one of its own tests.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_helpers import assert_same, finish, run_file
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Axes

from udm_grpo.checkpoints.checkpoint import (
    CheckpointError,
    Checkpoints,
    check_same_run,
    read_meta,
    resolve_resume,
    restore,
)

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 3, 9))
)


@jax.jit
def optimize(params: Any, opt_state: Any) -> Any:
    """Return (params, opt_state) after one update. Optax mixes float32 and int32, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = OPTIMIZER.update(jax.tree.map(jnp.sin, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def make_state(step: int) -> dict[str, Any]:
    """Return a training state after one AdamW update; all of its numbers depend on `step`."""
    draw = np.random.default_rng(step)
    shapes = {"layers": {"q": (2, 8, 64), "norm": (2, 64)}, "head": (64, 16)}
    numbers = jax.tree.map(draw.standard_normal, shapes, is_leaf=lambda node: isinstance(node, tuple))
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), numbers)
    params, opt_state = optimize(start, OPTIMIZER.init(start))
    return {
        "params": params,
        "opt_state": opt_state,
        "reference": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start),
        "ema": None,
        "step": jnp.int32(step),
        "drawn": np.int64(2**40 + step),
        "history": np.arange(step, step + 5, dtype=np.float64),
    }


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf, state
    )


def test_a_whole_training_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(3)
    meta = {"fingerprint": {"lr": 1e-4, "tags": ("a", "b")}, "best": None}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    assert not (tmp_path / "run").exists()
    checkpoints.save(3, state, meta)
    back, meta_back = checkpoints.restore(3, abstract(state))
    assert_same(state, back)
    assert meta_back == {"fingerprint": {"lr": 1e-4, "tags": ["a", "b"]}, "best": None}
    assert read_meta(checkpoints.path(3)) == meta_back
    assert_same(state, restore(str(checkpoints.path(3)), state)[0])


def test_a_restored_optimizer_goes_on_exactly(tmp_path):
    state = make_state(1)
    Checkpoints(tmp_path, keep=1).save(1, state, {})
    back, _ = restore(tmp_path / "00000001", abstract(state))
    uninterrupted = optimize(state["params"], state["opt_state"])
    resumed = optimize(back["params"], back["opt_state"])
    assert_same(uninterrupted, resumed)


def test_what_is_stored_knows_no_library(tmp_path):
    Checkpoints(tmp_path, keep=1).save(1, make_state(1), {})
    stored = b"".join(path.read_bytes() for path in (tmp_path / "00000001").rglob("*") if path.is_file())
    for word in (b"flax", b"nnx", b"optax", b"ScaleByAdam", b"pickle"):
        assert word not in stored


def test_part_of_a_state_can_be_read_alone(tmp_path):
    state = make_state(2)
    Checkpoints(tmp_path, keep=1).save(2, state, {})
    part, _ = restore(tmp_path / "00000002", {"params": abstract(state["params"])}, partial=True)
    assert_same(part, {"params": state["params"]})


def test_eight_devices_restore_what_one_device_saved_and_back(tmp_path):
    Checkpoints(tmp_path, keep=2).save(5, make_state(5), {"by": 1})
    assert "restored on 8 devices" in finish(run_file(__file__, str(tmp_path), devices=8))
    assert_same(restore(tmp_path / "00000006", abstract(make_state(5)))[0], make_state(5))


def reshard(folder: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    expected = make_state(5)

    def on_mesh(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        axes = Axes(*([None] * (leaf.ndim - 1) + ["model"])) if leaf.ndim else Axes()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, axes))

    sharded = jax.tree.map(on_mesh, expected)
    state, meta = restore(Path(folder) / "00000005", sharded)
    assert meta == {"by": 1}
    assert state["params"]["head"].sharding == sharded["params"]["head"].sharding
    assert len(state["params"]["head"].sharding.device_set) == 8
    assert_same(state, expected)
    Checkpoints(folder, keep=2).save(6, state, {"by": 8})
    print("restored on 8 devices")


def test_what_is_being_saved_may_be_used_up_by_training(tmp_path):
    """Buffers are donated repeatedly while the checkpoint is written; the state is saved as it was at `begin`."""
    forward = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 1.5 + 1, tree), donate_argnums=0)
    state = forward({f"layer_{i}": jnp.full(2**20, float(i)) for i in range(4)})
    was = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.begin(1, state, {"at": 1})
    for _ in range(20):
        state = forward(state)
    jax.block_until_ready(state)
    checkpoints.finish()
    assert_same(checkpoints.restore(1, was)[0], was)
    checkpoints.begin(2, state, {"at": 2})
    checkpoints.begin(3, forward(state), {"at": 3})  # waits for the one before
    checkpoints.finish()
    assert checkpoints.steps() == [3]


def test_only_the_newest_are_kept_and_the_best_has_its_own_slot(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    states = {step: {"x": jnp.full((3,), step, jnp.float32)} for step in (1, 2, 3, 10)}
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step})
        if step in (1, 2):
            checkpoints.save_best(step, state, {"best": step})
    assert checkpoints.steps() == [3, 10]
    assert checkpoints.latest() == 10
    assert Checkpoints(tmp_path, keep=5).steps() == [3, 10]
    best = checkpoints.best()
    assert [path.name for path in (tmp_path / "best").iterdir()] == [best.name] == ["2-step-2"]
    state, meta = checkpoints.restore(best, states[1])
    assert_same(state, states[2])
    assert meta == {"best": 2}


def test_the_best_may_be_saved_again_for_the_same_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.best() is None
    for value in (1.0, 2.0):
        checkpoints.save_best(7, {"x": jnp.full((2,), value)}, {})
    assert checkpoints.restore(checkpoints.best(), {"x": jnp.zeros(2)})[0]["x"].tolist() == [2.0, 2.0]
    assert checkpoints.latest() is None


def test_a_step_of_an_earlier_run_is_not_overwritten_but_can_be_set_aside(tmp_path):
    state = {"x": jnp.ones(2)}
    for step in (1, 2, 3):
        Checkpoints(tmp_path, keep=9).save(step, state, {})
    again = Checkpoints(tmp_path, keep=9)
    with pytest.raises(CheckpointError, match="00000002 already exists"):
        again.save(2, state, {})
    moved = again.set_aside_after(1)
    assert again.steps() == [1]
    assert [path.name for path in moved] == ["00000002.aside-1", "00000003.aside-1"]
    again.save(2, {"x": jnp.zeros(2)}, {})
    again.save(2, {"x": jnp.ones(2)}, {})  # the same run: a step has only one state, so this does nothing
    assert again.restore(2, state)[0]["x"].tolist() == [0.0, 0.0]
    assert restore(moved[0], state)[0]["x"].tolist() == [1.0, 1.0]
    assert [path.name for path in again.set_aside_after(-1)] == ["00000001.aside-1", "00000002.aside-2"]
    assert again.latest() is None


def test_only_arrays_and_plain_meta_can_be_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(TypeError, match="a is int: store it as") as caught:
        checkpoints.save(1, {"a": 1, "key": jax.random.key(0), "none": jnp.zeros((0, 2))}, {})
    assert "key is a random key" in str(caught.value)
    assert "none has no elements" in str(caught.value)
    with pytest.raises(CheckpointError, match="meta must be plain JSON"):
        checkpoints.save(1, {"a": jnp.ones(1)}, {"score": float("nan")})
    with pytest.raises(ValueError, match="two leaves are both named a/b"):
        checkpoints.save(1, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Checkpoints(tmp_path, keep=0)
    assert checkpoints.latest() is None


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    state = make_state(1)
    Checkpoints(tmp_path, keep=1).save(1, state, {})
    other = abstract(state)
    other["params"]["head"] = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    other["params"]["layers"]["norm"] = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)
    other["reference"] = {f"layer_{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(9)}
    with pytest.raises(CheckpointError, match="is a checkpoint of another model") as caught:
        restore(tmp_path / "00000001", other)
    text = str(caught.value)
    assert "9 missing: reference/layer_0; reference/layer_1;" in text
    assert "... and 4 more" in text
    assert "3 unexpected: reference/head; reference/layers/norm; reference/layers/q" in text
    assert "2 of another shape or dtype: params/head is float32[64, 16], expected float32[64, 32];" in text
    assert "params/layers/norm is float32[2, 64], expected bfloat16[2, 64]" in text
    assert "resume=none" in text


def test_another_configuration_is_named_field_by_field():
    saved = {"seed": 0, "grpo": {"kl": 0.05, "window": [0, 5], "ema": None}, "path": {"alpha": 0.9}}
    check_same_run({"fingerprint": saved}, {**saved, "grpo": {"kl": 0.05, "window": (0, 5), "ema": None}})
    with pytest.raises(CheckpointError, match="of a run with another configuration") as caught:
        check_same_run(
            {"fingerprint": saved}, {"seed": 1, "grpo": {"kl": 0.05, "window": [0, 6]}, "path": saved["path"]}
        )
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "grpo.ema: saved null, now absent",
        "grpo.window.1: saved 5, now 6",
        "seed: saved 0, now 1",
    ]
    with pytest.raises(CheckpointError, match="no fingerprint"):
        check_same_run({}, saved)


def test_resume_finds_the_checkpoint_or_says_what_is_missing(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    assert resolve_resume("none", folder) is None
    assert resolve_resume("latest", folder) is None
    checkpoints = Checkpoints(folder, keep=3)
    for step in (10, 20):
        checkpoints.save(step, {"x": jnp.ones(1)}, {})
    checkpoints.save_best(10, {"x": jnp.ones(1)}, {})
    assert resolve_resume("none", folder) is None
    assert resolve_resume("latest", folder) == folder / "00000020"
    assert resolve_resume(str(folder / "00000010"), "elsewhere") == folder / "00000010"
    assert resolve_resume(str(folder), "elsewhere") == folder / "00000020"
    assert resolve_resume(str(folder.parent), "elsewhere") == folder / "00000020"
    assert resolve_resume(str(checkpoints.best()), "elsewhere") == folder / "best" / "1-step-10"
    with pytest.raises(CheckpointError, match=r"gone: no such folder"):
        resolve_resume(str(tmp_path / "gone"), folder)
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a folder of"):
        resolve_resume(str(tmp_path), folder)
    with pytest.raises(CheckpointError, match=r"00000030 is not a complete checkpoint \(no such folder\)"):
        checkpoints.restore(30, {"x": jnp.ones(1)})


def test_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpoints("checkpoints", keep=1).save(1, {"x": jnp.ones(1)}, {})
    assert resolve_resume("latest", "checkpoints") == tmp_path / "checkpoints" / "00000001"
    assert restore("checkpoints/00000001", {"x": jnp.ones(1)})[1] == {}


if __name__ == "__main__":
    reshard(sys.argv[1])

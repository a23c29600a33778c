"""Tests that pre-training resumes from the previous state if one is damaged, with the same final result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import pretrain_shapes
from udm_grpo import compiled, pretrain
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints
from udm_grpo.released.weights import load_folder
from udm_grpo.run import path_of
from udm_grpo.worlds.base_checkpoint import ASSETS, Plan, TokenizerTraining


@pytest.fixture(autouse=True)
def quick_updates(monkeypatch):
    """Replace updates by ones that depend on state and batch but need no compilation, since only saving is tested."""

    def update(params, opt_state, *batch):
        moved = 1 + sum(float(jnp.sum(array)) for array in batch if array.dtype in (jnp.float32, jnp.int32)) / 1e6
        return jax.tree.map(lambda leaf: leaf * moved, params), opt_state, {"loss": jnp.float32(moved)}

    monkeypatch.setattr(compiled, "pretrain_step", lambda *_: update)
    monkeypatch.setattr(compiled, "tokenizer_step", lambda *_: update)


def assert_equal(one, other):
    for leaf, same in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, same)


def damage(checkpoint):
    (checkpoint / "state" / "manifest.ocdbt").write_bytes(b"")


def test_the_transformer_goes_back_to_the_state_before_a_damaged_one(tmp_path, capsys):
    released = dataclasses.replace(load_folder(ASSETS / "ursa-shapes"), transformer={"x": jnp.ones(3)})
    ids = released.tokenizer(["a photo of a red circle"] * 4)
    images = np.arange(4 * 16, dtype=np.int32).reshape(4, 4, 4)
    data = pretrain.TokenData(prompt_ids=ids, image_ids=images, empty_ids=released.tokenizer.empty())
    plan = pretrain.PretrainPlan(updates=3, batch=2, warmup=1, save_every=1)

    def train():
        states = Checkpoints(tmp_path, keep=2)
        return pretrain.pretrain(released, path_of(released), data, plan, states, print)

    first = train()
    damage(tmp_path / "00000003")
    assert_equal(train(), first)
    assert "00000003 is damaged" in capsys.readouterr().err
    for step in (2, 3):
        damage(tmp_path / f"{step:08d}")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
        train()


def test_the_image_tokenizer_goes_back_to_the_state_before_a_damaged_one(tmp_path, capsys):
    plan = dataclasses.replace(Plan(), pool=8, tokenizer_batch=2)

    def train(updates):
        training = TokenizerTraining(pretrain_shapes.WORLD, plan, tmp_path)
        return training.phase("continuous", {"x": jnp.ones(3)}, updates, False)

    train(1)
    first = train(2)
    damage(tmp_path / "tokenizer_continuous" / "00000002")
    assert_equal(train(2), first)
    assert "00000002 is damaged" in capsys.readouterr().err

"""Tests of too little disk space for a checkpoint: refused before loading or saving, with advice on what to free."""

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import geneval, shapes
from udm_grpo import mesh as meshes
from udm_grpo import train
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints, resolve_resume
from udm_grpo.config import ConfigError
from udm_grpo.files.disk_space import files_bytes, free_bytes, tree_bytes
from udm_grpo.lifecycle.disk_check import check_space, needed_bytes
from udm_grpo.model import transformer
from udm_grpo.model.execution import TransformerConfig
from udm_grpo.run import abstract_state, optimizer_of

ASSETS = Path(train.__file__).parent / "assets"
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch):
    """Return a function that sets how many bytes every disk reports as free."""

    def set_free(free, total=10**15):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(total, total - free, free))

    return set_free


def sizes(folder):
    """Return the abstract parameters of the transformer in a folder."""
    return transformer.abstract(TransformerConfig.from_json(json.loads((folder / "config.json").read_text())))


def needs(config, whole):
    """Return the result of needed_bytes for a run on one device, and the abstract state."""
    mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    state = abstract_state(optimizer_of(config), whole, config.optimizer.ema_decay > 0, mesh)
    return needed_bytes(config, state, whole, Path(config.output_dir) / "checkpoints"), state


def test_a_save_that_does_not_fit_is_refused_and_what_was_saved_stays(tmp_path, disk):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    state = {"x": jnp.arange(300_000, dtype=jnp.float32)}
    checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    (tmp_path / "export").mkdir()
    disk(free=1_100_000)
    with pytest.raises(CheckpointError, match=r"too little disk for .*00000003: a checkpoint needs 1\.1 MiB") as caught:
        checkpoints.save(3, state, {})
    said = str(caught.value)
    assert "00000002 (the newest checkpoint: needed to continue)" in said
    assert str(tmp_path / "export") in said
    assert "checkpoint.resume=latest" in said
    assert checkpoints.steps() == [1, 2]
    assert resolve_resume("latest", folder).name == "00000002"
    disk(free=1_200_000)
    checkpoints.save(3, state, {})
    assert checkpoints.steps() == [2, 3]


def test_a_checkpoint_takes_what_is_reckoned(tmp_path):
    state = {"x": jnp.arange(1_000_000, dtype=jnp.float32), "y": jnp.zeros((1000, 100), jnp.bfloat16)}
    Checkpoints(tmp_path, keep=1).save(1, state, {})
    assert tree_bytes(state) == 4_200_000
    assert files_bytes(tmp_path) == pytest.approx(tree_bytes(state), rel=0.02)


def test_a_run_that_cannot_save_is_refused_before_its_folder_is_made(tmp_path, disk, monkeypatch):
    config = shapes.get_config("smoke")
    config.output_dir = str(tmp_path / "run")
    monkeypatch.setattr("udm_grpo.run.rewards.connect", lambda *_: pytest.fail("a scorer was started"))
    disk(free=2**20)
    with pytest.raises(ConfigError, match=r"too little disk for the checkpoints of this run .*run/checkpoints"):
        train.train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_fill_the_disk_is_warned_of(tmp_path, disk, capsys):
    config = shapes.get_config()
    config.output_dir = str(tmp_path / "run")
    whole = sizes(ASSETS / "ursa-shapes" / "transformer")
    (size, further), state = needs(config, whole)
    # Parameters, two moments and the reference in float32, and a few scalars; keep is 2, so three exist at a time.
    assert size == pytest.approx(4 * tree_bytes(whole), rel=1e-4)
    exported = files_bytes(ASSETS / "ursa-shapes" / "transformer")
    assert further == 2 * size + exported
    for free, warned in ((size + further, False), (size + further - 1, True), (size, True)):
        disk(free)
        check_space(config, state, whole)
        assert ("warning: " in capsys.readouterr().err) == warned
    disk(size - 1)
    with pytest.raises(ConfigError, match="too little disk"):
        check_space(config, state, whole)


def test_a_disk_that_does_not_tell_is_not_judged(tmp_path, disk):
    disk(free=0, total=0)
    assert free_bytes(tmp_path / "not" / "there") is None
    Checkpoints(tmp_path, keep=1).save(1, {"x": jnp.ones(4)}, {})


def test_the_published_recipe_needs_what_its_page_says():
    config = geneval.get_config()
    (size, further), _ = needs(config, sizes(ASSETS / "ursa-1.7b-ibq512" / "transformer"))
    assert size == pytest.approx(32e9, rel=0.02)
    assert further == 2 * size  # the export adds nothing, since the model folder is not here

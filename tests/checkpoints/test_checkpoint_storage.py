"""Tests of checkpoints in folders with special characters, of checks after a save, and of resuming after damage."""

import gc
import os
import shutil
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from udm_grpo.checkpoints import checkpoint, checkpoint_storage
from udm_grpo.checkpoints.checkpoint import CheckpointError, Checkpoints, DamagedError, resolve_resume, restore
from udm_grpo.checkpoints.checkpoint_fallback import restore_or_older
from udm_grpo.files import durable

# If a file is damaged, Orbax leaves a pending task in its event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Collect garbage, so that Orbax's leftovers are reported in the test that caused them."""
    yield
    gc.collect()


STATE = {"x": jnp.arange(40_000.0), "y": jnp.ones((30, 30)), "step": jnp.int32(4)}
ODD = (
    "[lr=1e-4]",
    "a[b]",
    "a*b",
    "a?b",
    "**",
    "a\\b",
    "gs:",
    "a\nb",
    "with space",
    "日本 é",
    "a%20b",
    os.fsdecode(b"\xff"),
)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_any_name_of_a_folder_can_be_saved_in_and_resumed_from(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {**STATE, "step": jnp.int32(step)}, {"step": step})
    checkpoints.save_best(2, STATE, {})
    assert checkpoints.steps() == [2]
    newest = resolve_resume("latest", folder)
    assert newest == folder / "00000002"
    state, meta = restore(newest, STATE)
    assert (state["step"], meta) == (2, {"step": 2})
    assert restore(checkpoints.best(), STATE)[0]["step"] == 4
    for number in (1, 2):
        assert [path.name for path in checkpoints.set_aside_after(-1)] == [f"00000002.aside-{number}"]
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.save(2, STATE, {})
    renamed = folder.parent / name
    (folder / "00000002").rename(renamed)
    assert restore(renamed, STATE)[0]["step"] == 4


def test_a_pattern_in_a_name_does_not_reach_another_folder(tmp_path):
    """ "lr=*" would match "lr=1" if the path were used as a pattern."""
    for name, value in (("lr=1", 1.0), ("lr=*", 2.0)):
        Checkpoints(tmp_path / name, keep=1).save(1, {"x": jnp.full(3, value), name: jnp.zeros(2)}, {})
    back, _ = restore(tmp_path / "lr=*" / "00000001", {"x": jnp.zeros(3), "lr=*": jnp.zeros(2)})
    assert back["x"].tolist() == [2.0] * 3


def test_odd_names_without_a_plain_temporary_folder_are_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_storage.tempfile, "gettempdir", lambda: str(tmp_path / "[x]"))
    monkeypatch.setattr(checkpoint_storage.os, "access", lambda *_: False)
    checkpoint_storage._links.cache_clear()
    with pytest.raises(CheckpointError, match="set TMPDIR to a writable folder"):
        Checkpoints(tmp_path / "[x]", keep=1).save(1, STATE, {})


def damage_data(folder):
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])


def damage_largest(folder):
    largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "values": damage_data,
    "no values": lambda folder: [path.unlink() for path in folder.rglob("d/*")],
    "manifest": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "no manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "names": lambda folder: (folder / "state" / "_METADATA").write_bytes(b""),
    "marks": lambda folder: [path.write_bytes(b"") for path in folder.glob("_*") if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_back_does_not_count_and_deletes_nothing(tmp_path, monkeypatch, damage):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, STATE, {})
    checkpoints.save_best(1, STATE, {})
    make_durable = checkpoint.make_durable
    monkeypatch.setattr(checkpoint, "make_durable", lambda path: (DAMAGES[damage](Path(path)), make_durable(path)))
    for save in (checkpoints.save, checkpoints.save_best):
        with pytest.raises(CheckpointError, match="was written but cannot be read back") as caught:
            save(2, STATE, {})
        assert "no older checkpoint was deleted" in str(caught.value)
    assert restore(tmp_path / "00000001", STATE)[0]["step"] == 4
    assert restore(tmp_path / "best" / "1-step-1", STATE)[0]["step"] == 4


def test_everything_is_on_the_disk_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    """A full or failing disk may be reported by fsync only; the older checkpoint must still exist then."""
    synced = []
    fsync = os.fsync

    def watch(opened):
        synced.append(os.readlink(f"/proc/self/fd/{opened}"))
        assert (tmp_path / "00000001").is_dir()
        fsync(opened)

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, STATE, {})
    monkeypatch.setattr(durable.os, "fsync", watch)
    checkpoints.save(2, STATE, {})
    new = tmp_path / "00000002"
    # A file that was renamed after its fsync no longer exists under the name that was synced.
    assert set(filter(os.path.exists, synced)) == {str(path) for path in (*new.rglob("*"), new, tmp_path)}
    monkeypatch.setattr(durable.os, "fsync", mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoints.save(3, STATE, {})
    assert (new / "commit_success.txt").exists()


@pytest.mark.parametrize("damage", [*DAMAGES, "some values"])
def test_latest_goes_back_past_a_damaged_checkpoint_and_says_so(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, {**STATE, "step": jnp.int32(step)}, {"step": step})
    {**DAMAGES, "some values": damage_largest}[damage](tmp_path / "00000002")
    checked = []
    for resume in ("latest", str(tmp_path)):
        newest = resolve_resume(resume, tmp_path)
        state, meta = restore_or_older(newest, STATE, resume, checked.append)
        assert (state["step"], meta) == (1, {"step": 1})
        said = capsys.readouterr().err
        assert "00000002 is damaged: " in said
        assert "before it is tried" in said or "Going back to" in said
    assert checked[-1] == {"step": 1}
    with pytest.raises(DamagedError, match="00000002 is damaged"):
        restore_or_older(tmp_path / "00000002", STATE, str(tmp_path / "00000002"), checked.append)
    again = Checkpoints(tmp_path, keep=3)
    assert [path.name for path in again.set_aside_after(1)] == ["00000002.aside-1"]
    again.save(2, STATE, {})
    assert restore(again.path(2), STATE)[0]["step"] == 4


def test_a_folder_of_damaged_checkpoints_does_not_begin_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, STATE, {})
        shutil.rmtree(tmp_path / f"{step:08d}" / "state")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; restore a copy"):
        resolve_resume("latest", tmp_path)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints in .* are damaged; restore a copy"):
        restore_or_older(tmp_path / "00000002", STATE, "latest", lambda meta: None)

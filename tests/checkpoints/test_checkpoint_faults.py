"""Tests of checkpoints under faults: a kill or a full disk during a save, leftovers, damaged files.

Run as a program (`python test_checkpoint_faults.py SAVE_FOREVER folder`, ...), this file is also the other process
of its own tests: one that is killed while it saves, or one whose disk is full.
"""

import contextlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import assert_same, change_a_number, finish, run_file

from udm_grpo.checkpoints.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    read_meta,
    resolve_resume,
    restore,
)
from udm_grpo.checkpoints.checkpoint_contents import CONTENTS, write_contents
from udm_grpo.checkpoints.checkpoint_fallback import restore_newest


def test_leftovers_of_interrupted_saves_do_not_count_and_are_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = {"x": jnp.ones(4)}
    checkpoints.save(1, state, {})
    # What a killed deletion leaves behind, or a killed save to a bucket.
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")
    (tmp_path / "00000002" / "commit_success.txt").unlink()
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000003.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "00000001", tmp_path / "mine")
    assert checkpoints.steps() == [1]
    with pytest.raises(CheckpointError, match="00000002 is not a complete checkpoint"):
        checkpoints.restore(2, state)
    with pytest.raises(CheckpointError, match="neither a complete checkpoint"):
        resolve_resume(str(tmp_path / "00000002"), tmp_path)
    checkpoints.save(4, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000004", "mine"]


def test_a_damaged_checkpoint_is_called_damaged(tmp_path):
    state = {"x": jnp.arange(1000)}
    Checkpoints(tmp_path, keep=2).save(1, state, {})
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")
    for path in (tmp_path / "00000001").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="00000001 is damaged: ") as caught:
        restore(tmp_path / "00000001", state)
    assert len(str(caught.value)) < 1000
    (tmp_path / "00000002" / "state" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"00000002 is (damaged|not a complete checkpoint)"):
        restore(tmp_path / "00000002", state)


def change_values(checkpoint: Path) -> None:
    change_a_number(checkpoint, np.arange(1000, dtype=np.int32) + np.int32(2))


def lose_a_file(checkpoint: Path) -> None:
    max(Path(checkpoint).rglob("d/*"), key=lambda path: path.stat().st_size).unlink()


def cut_the_list(checkpoint: Path) -> None:
    file = checkpoint / CONTENTS
    file.write_text(file.read_text()[:40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_values, "00000002 is damaged: state/.* has other content than was saved"),
        (lose_a_file, "00000002 is damaged: state/.* is missing"),
        (cut_the_list, "00000002 is damaged: contents.json cannot be read"),
    ],
)
def test_every_kind_of_damage_is_found_and_the_one_before_is_taken(tmp_path, capsys, damage, message):
    checkpoints = Checkpoints(tmp_path, keep=2)
    states = [{"x": jnp.arange(1000) + step} for step in (1, 2)]
    for step, state in enumerate(states, 1):
        checkpoints.save(step, state, {})
    damage(checkpoints.path(2))
    with pytest.raises(DamagedError, match=message):
        checkpoints.restore(2, states[0])
    newest = restore_newest(tmp_path, states[0])
    assert newest is not None
    assert_same(newest[0], states[0])
    assert f"Going back to {checkpoints.path(1)}." in capsys.readouterr().err


def test_half_a_list_is_never_left(tmp_path, monkeypatch):
    """A kill while the list is written must not make a complete checkpoint look damaged."""
    folder = Checkpoints(tmp_path, keep=2).save(1, {"x": jnp.arange(1000)}, {})
    (folder / CONTENTS).unlink()

    def cut(path: Path, data: str) -> None:
        path.write_bytes(data.encode()[:40])
        raise OSError("killed")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="killed"):
        write_contents(folder)
    assert not (folder / CONTENTS).exists()


def test_a_checkpoint_without_a_list_of_its_files_is_read(tmp_path):
    """Earlier versions saved checkpoints without a list, and a kill right after the commit leaves one without."""
    checkpoints, state = Checkpoints(tmp_path, keep=2), {"x": jnp.arange(1000)}
    (checkpoints.save(1, state, {}) / CONTENTS).unlink()
    assert_same(checkpoints.restore(1, state)[0], state)


def test_a_process_killed_while_saving_leaves_the_last_good_checkpoint(tmp_path):
    """Kill a process that saves continuously at random moments; the next process continues in the same folder."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    seen = interrupted = rounds = 0
    delays = random.Random(0)
    while rounds < 4 or (0 in (interrupted, seen) and rounds < 20):
        rounds += 1
        process = run_file(__file__, "SAVE_FOREVER", str(tmp_path))
        assert process.stdout.readline() == "saving\n"
        time.sleep(delays.uniform(0.05, 0.8) * (1 + rounds / 4))  # increasing delays, for slow machines
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += any(".orbax-checkpoint-tmp" in path.name for path in tmp_path.glob("**/*"))
        latest = checkpoints.latest() or 0
        assert latest >= seen
        for step in checkpoints.steps():
            assert_good(checkpoints.path(step), step)
        if checkpoints.best():
            assert_good(checkpoints.best(), read_meta(checkpoints.best())["step"])
        seen = latest
    assert seen > 0
    assert interrupted > 0
    assert resolve_resume("latest", tmp_path) == checkpoints.path(seen)


def make_large_state(step: int) -> dict[str, np.ndarray]:
    return {f"layer_{i}": np.arange(2**18, dtype=np.int32) + np.int32(100 * step + i) for i in range(8)}


def assert_good(path: Any, step: int) -> None:
    state, meta = restore(path, make_large_state(0))
    assert meta == {"step": step}
    assert_same(state, make_large_state(step))


def save_forever(folder: str) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    step = checkpoints.latest() or 0
    print("saving", flush=True)
    while True:
        step += 1
        checkpoints.save_best(step, make_large_state(step), {"step": step})
        checkpoints.begin(step, make_large_state(step), {"step": step})  # written while the next state is computed


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of 1 MiB at the folder within the block; yield False where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("limit", ["disk", "file size"])
def test_a_full_disk_is_a_clear_error_and_the_last_good_checkpoint_stays(tmp_path, limit):
    """The disk is a mount of 1 MiB where that is allowed; otherwise, and in the second case, file size is limited."""
    with small_disk(tmp_path / "disk") as mounted:
        folder = tmp_path / "disk" / "checkpoints"
        mode = "FULL_DISK" if limit == "disk" and mounted else "FILE_LIMIT"
        output = finish(run_file(__file__, mode, str(folder)))
        assert "saving " + str(folder / "00000002") in output
        assert "It needs 2.0 MiB; the disk has " in output
        assert f"The last good checkpoint is {folder / '00000001'}; nothing was deleted." in output
        assert "it continues with 3" in output
        checkpoints = Checkpoints(folder, keep=1)
        assert checkpoints.steps() == [3]
        assert checkpoints.restore(3, {"x": jnp.zeros(9)})[0]["x"].tolist() == [3.0] * 9


def full_disk(folder: str, file_limit: bool) -> None:
    checkpoints = Checkpoints(folder, keep=1)
    small = {"x": jnp.full((9,), 1.0)}
    checkpoints.save(1, small, {})
    if file_limit:
        # Writes then fail with EFBIG, as they fail with ENOSPC on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    for save in (checkpoints.save, checkpoints.save_best):
        try:
            # As if there had been enough space when the save began, and other programs used it up.
            with mock.patch("udm_grpo.checkpoints.checkpoint.save_problem", return_value=""):
                save(2, {"x": jax.random.normal(jax.random.key(0), (2**19,))}, {})
        except CheckpointError as error:
            print(error)
        else:
            raise AssertionError("saving 2 MiB on a disk of 1 MiB succeeded")
        assert checkpoints.steps() == [1]
        assert checkpoints.best() is None
        assert_same(checkpoints.restore(1, small)[0], small)
    assert [path.name for path in Path(folder).iterdir() if path.name != "best"] == ["00000001"]
    checkpoints.save(3, {"x": jnp.full((9,), 3.0)}, {})
    print("it continues with", checkpoints.latest())


if __name__ == "__main__":
    if sys.argv[1] == "SAVE_FOREVER":
        save_forever(sys.argv[2])
    else:
        full_disk(sys.argv[2], file_limit=sys.argv[1] == "FILE_LIMIT")

"""The lock of an output folder: against live processes, after kills, from other machines, and taken away."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from running import ROOT

from rewards_bridge.errors import UserError
from scripts import prepare_prompts, pretrain_shapes
from udm_grpo import convert, evaluate, pretrain, sample, train
from udm_grpo.files import folder_lock
from udm_grpo.files.folder_lock import FolderLockedError, LockFile, lock_beside, lock_inside, locked
from udm_grpo.multihost import process_identity
from udm_grpo.multihost.process_identity import runs_here

ASSETS = ROOT / "udm_grpo" / "assets"
HOLD = """
import sys, time
from pathlib import Path
from udm_grpo.files import folder_lock
folder_lock.LockFile.beat_s = 0.1
with folder_lock.lock_inside(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Shorten all waits, for processes that answer within a tenth of a second."""
    for name, seconds in (("POLL_S", 0.02), ("BUSY_S", 0.1), ("SILENT_S", 0.4), ("SETTLE_S", 0.05)):
        monkeypatch.setattr(folder_lock, name, seconds)
    monkeypatch.setattr(LockFile, "beat_s", 0.05)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def of_another_machine(path, **changes):
    """Rewrite a lock as if a process on another machine held it."""
    said = json.loads(path.read_bytes()) | {"machine": "another", "host": "node-7"} | changes
    path.write_bytes(json.dumps(said).encode().ljust(1023) + b"\n")


def test_a_lock_comes_and_goes_with_the_folders_that_it_needs(tmp_path):
    with lock_inside(tmp_path / "a" / "b"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())
    with lock_inside(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with lock_beside(tmp_path / "c" / "out"):
        assert [path.name for path in (tmp_path / "c").iterdir()] == [".out.lock"]
    assert not (tmp_path / "c").exists()


def test_a_process_that_runs_keeps_others_out_and_is_named(tmp_path, holder, capsys):
    with pytest.raises(FolderLockedError) as caught, lock_inside(tmp_path / "run"):
        pass
    text = str(caught.value)
    assert f"process {holder.pid} on " in text
    assert f"kill {holder.pid}" in text
    assert f"remove {tmp_path / 'run' / '.lock'}" in text
    assert "waiting for up to" in capsys.readouterr().err
    holder.send_signal(signal.SIGSTOP)  # a suspended process is still alive
    with pytest.raises(FolderLockedError), lock_inside(tmp_path / "run"):
        pass


def test_a_process_that_was_killed_does_not_block(tmp_path, holder, capsys):
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with lock_inside(tmp_path / "run"):
        assert time.monotonic() - began < 5
    assert f"process {holder.pid} on" in capsys.readouterr().err
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_process_that_ends_meanwhile_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setenv(folder_lock.WAIT_VARIABLE, "60")
    threading.Timer(0.3, holder.kill).start()
    with lock_inside(tmp_path / "run"):
        holder.wait()


def test_a_run_that_waits_for_a_folder_hears_that_it_is_to_stop(tmp_path, holder, monkeypatch, capsys):
    """Training, here in this process, records its signals itself, so the wait has to check them."""
    monkeypatch.setenv(folder_lock.WAIT_VARIABLE, "60")
    monkeypatch.setattr(folder_lock, "POLL_S", 30)
    before = sorted(tmp_path.rglob("*"))
    for number in (signal.SIGTERM, signal.SIGINT):
        began = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        words = ["--config=configs/shapes.py:smoke", f"--config.output_dir={tmp_path / 'run'}"]
        assert train.main([*words, "--config.checkpoint.stopped_status=75"]) == 75
        assert 0.5 <= time.monotonic() - began < 5
        said = capsys.readouterr().err
        assert f"is in use by -c (process {holder.pid} on" in said
        assert f"stopped by {signal.Signals(number).name} before the first iteration" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_another_machine_keeps_the_lock_while_it_changes_it(tmp_path, capsys):
    lock = tmp_path / ".lock"
    with lock_inside(tmp_path):
        content = lock.read_bytes()
    lock.write_bytes(content)
    of_another_machine(lock, pid=1)
    stopped = threading.Event()

    def beat():
        count = 0
        while not stopped.wait(0.03):
            count += 1
            of_another_machine(lock, beat=count)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(FolderLockedError, match="on node-7: kill 1"), lock_inside(tmp_path):
            pass
    finally:
        stopped.set()
        beating.join()
    capsys.readouterr()
    with lock_inside(tmp_path):  # it is silent now
        said = capsys.readouterr().err
        assert "process 1 on node-7" in said
        assert "was silent for 0.4 s" in said
    assert not lock.exists()


@pytest.mark.parametrize("content", [b"", b"x", b"[1]", b'{"pid": "x"}', b'{"pid": 1, "machine": 3}'])
def test_a_lock_that_says_nothing_is_taken_over_too(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with lock_inside(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_pid_that_is_used_again_is_another_process():
    mine = process_identity.process_identity()
    assert runs_here(mine) is True
    assert runs_here(mine | {"started": "1"}) is False
    assert runs_here(mine | {"machine": "another"}) is None
    assert runs_here({}) is None


def test_of_many_that_take_over_at_once_one_gets_it(tmp_path):
    """For example, all requeued jobs of a machine that went down."""
    with lock_inside(tmp_path):
        content = (tmp_path / ".lock").read_bytes()
    (tmp_path / ".lock").write_bytes(content)
    of_another_machine(tmp_path / ".lock")
    inside, most, refused = [], [], []

    def enter():
        try:
            with lock_inside(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(1)
                inside.pop()
        except FolderLockedError:
            refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) + len(refused) == 6


def test_the_same_thread_may_hold_a_lock_twice(tmp_path):
    with lock_inside(tmp_path), lock_inside(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("links", [True, False])
def test_without_links_the_lock_is_made_as_well(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(folder_lock.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    place = LockFile(tmp_path / ".lock")
    assert place.create(b"one")
    assert not place.create(b"two")
    assert place.read() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_who_has_lost_the_lock_notices(tmp_path):
    with locked(LockFile(tmp_path / ".lock"), "run", end=False) as lock:
        (tmp_path / ".lock").unlink()  # by hand: it is made again
        deadline = time.monotonic() + 5
        while not (tmp_path / ".lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lock.check()
        of_another_machine(tmp_path / ".lock", token="another", pid=9)
        while not lock.taken_by:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(FolderLockedError, match=r"run was taken over by .* \(process 9 on node-7"):
            lock.check()
    assert (tmp_path / ".lock").exists()  # it is another's


def test_a_run_that_has_lost_the_lock_ends(tmp_path, holder):
    of_another_machine(tmp_path / "run" / ".lock", token="another")
    assert holder.wait(10) == 1


def test_a_bad_waiting_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(folder_lock.WAIT_VARIABLE, "soon")
    with pytest.raises(UserError, match="UDM_GRPO_LOCK_WAIT_S is 'soon'"), lock_inside(tmp_path):
        pass


def test_every_command_that_writes_a_folder_waits_for_its_lock(tmp_path, holder, capsys):
    prompts = tmp_path / "train.txt"
    prompts.write_text('a sign that says "ok"\n')
    run, base = str(tmp_path / "run"), str(ASSETS / "ursa-shapes")
    beside = tmp_path / ".run2.lock"
    beside.write_bytes((tmp_path / "run" / ".lock").read_bytes())
    other = str(tmp_path / "run2")
    commands = {
        sample.main: ["--checkpoint", base, "--prompt", "a", "--output", run],
        evaluate.main: ["--samples", run, "--scorer", "jpeg", "--output", run],
        convert.main: ["rewrite", "--base", base, "--dtype", "float32", "--output", other],
        prepare_prompts.main: ["ocr", "--train", str(prompts), "--output", other],
    }
    for main, words in commands.items():
        assert main(words) == 2, words
        said = " ".join(capsys.readouterr().err.split())
        assert f"is in use by -c (process {holder.pid} on" in said, said
    pretraining = {
        pretrain.main: ["--checkpoint", base, "--data", "tokens.npz", "--output", run, "--updates", "1"],
        pretrain_shapes.main: ["--output", run],
    }
    for main, words in pretraining.items():
        assert main(words) == 2, words
        assert f"error: {run} is in use by -c (process {holder.pid} on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run2.lock", "run", "train.txt"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]

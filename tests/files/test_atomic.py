"""Files and folders that are replaced while others read them, and while other hosts write beside them."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from udm_grpo.files import atomic, folder_lock
from udm_grpo.files.atomic import exchange, remove_unfinished, replace_file, replacing_folder
from udm_grpo.files.folder_lock import FolderLockedError, lock_beside


def fill(target, text="whole"):
    with replacing_folder(target, "marker") as fresh:
        (fresh / "marker").write_text(text)


def test_processes_with_the_same_id_on_several_hosts_replace_one_file(tmp_path, monkeypatch):
    """In containers the id is always 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "file"

    def write(text):
        for _ in range(100):
            replace_file(target, partial(Path.write_text, data=text))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write, "a" * 5000), pool.submit(write, "b" * 5000)]:
            done.result()
    assert target.read_text() in ("a" * 5000, "b" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "[a]*?\\", "new\nline"], ids=ascii)
def test_any_name_can_be_replaced(tmp_path, name):
    replace_file(tmp_path / name, Path.touch)
    (tmp_path / name).unlink()
    for text in ("first", "second"):
        fill(tmp_path / name, text)
        assert (tmp_path / name / "marker").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [name]
    replace_file(tmp_path / name / name, Path.touch)
    (tmp_path / name / ".x.host-1-ab.unfinished").touch()
    remove_unfinished(tmp_path / name)
    assert {path.name for path in (tmp_path / name).iterdir()} == {"marker", name}


def test_readers_always_find_a_folder(tmp_path):
    target = tmp_path / "export"
    fill(target)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two folders")
    missing, reads, stopped = [], [], threading.Event()

    def read():
        while not stopped.is_set():
            reads.append(1)
            try:
                os.stat(target / "marker")
            except FileNotFoundError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(50):
            fill(target, str(number))
    finally:
        stopped.set()
        reader.join()
    assert len(reads) > 50
    assert not missing
    assert (target / "marker").read_text() == "49"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, None])
def test_a_system_that_cannot_exchange_replaces_all_the_same(tmp_path, monkeypatch, number):
    def fail(*_):
        atomic.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(atomic, "_renameat2", lambda: fail if number else None)
    for text in ("first", "second"):
        fill(tmp_path / "export", text)
    assert (tmp_path / "export" / "marker").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_exchange_that_fails_leaves_the_older_folder(tmp_path, monkeypatch):
    fill(tmp_path / "export", "first")

    def fail(*_):
        atomic.ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(atomic, "_renameat2", lambda: fail)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "export", "second")
    assert (tmp_path / "export" / "marker").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_leftovers_of_a_kill_go_and_those_of_another_target_stay(tmp_path):
    ours = (".a.new", ".a.host-1-0123456789ab.new", ".a.host-1-0123456789ab.old")
    others = (".a.b.host-1-0123456789ab.new", ".b.new", ".a.txt.new")
    for name in (*ours, *others, "a"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a"}


def test_two_that_write_one_folder_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "POLL_S", 0.01)
    monkeypatch.setattr(folder_lock, "BUSY_S", 0.05)
    held, ended = threading.Event(), threading.Event()

    def hold():
        with lock_beside(tmp_path / "export"):
            held.set()
            ended.wait(20)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        assert held.wait(20)
        with pytest.raises(FolderLockedError, match="is in use by"):
            fill(tmp_path / "export")
    finally:
        ended.set()
        holding.join()
    fill(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_another_process_took_over_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock.LockFile, "beat_s", 0.02)
    fill(tmp_path / "export", "theirs")

    def lose():
        with replacing_folder(tmp_path / "export", "marker"):
            (tmp_path / ".export.lock").write_bytes(b'{"token": "another"}')
            time.sleep(0.5)

    with pytest.raises(FolderLockedError, match="was taken over"):
        lose()
    assert (tmp_path / "export" / "marker").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.lock", "export"]

"""Runs, models and prompts in a bucket, against an emulator of Google Cloud Storage on this machine."""

import importlib.util
import json
import logging
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import running

from udm_grpo import report, sample
from udm_grpo.checkpoints.checkpoint import Checkpoints, resolve_resume
from udm_grpo.files import buckets, folder_lock
from udm_grpo.files.bucket_lock import LockObject, lock_output
from udm_grpo.files.buckets import Mirror, download, listing, local, local_prompts
from udm_grpo.files.folder_lock import FolderLockedError
from udm_grpo.files.places import PlaceError
from udm_grpo.files.set_aside import set_aside

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="requirements.txt has gcp-storage-emulator")
# gcsfs reads its settings when it is imported, so the fixture below has to come first.
if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("requirements.txt has gcsfs", allow_module_level=True)

ASSETS = running.ROOT / "udm_grpo" / "assets"
pytestmark = pytest.mark.filterwarnings("default")  # of the emulator and of Google's libraries


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Yield the environment of a process that uses the emulator, set in this one too; the bucket is named bkt."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bkt")
    server.start()
    address = f"http://localhost:{port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "UDM_GRPO_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
    server.stop()


def put(address, content):
    buckets.storage().pipe_file(address.removeprefix("gs://"), content)


def put_folder(folder, address):
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{address}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_a_folder_is_copied_once_and_again_when_it_changes(bucket, tmp_path, monkeypatch):
    put("gs://bkt/one/a.txt", b"a")
    put("gs://bkt/one/deep/b.txt", b"b")
    target = tmp_path / "copy"
    assert set(download("gs://bkt/one", target)) == {"a.txt", "deep/b.txt"}
    assert (target / "deep" / "b.txt").read_bytes() == b"b"
    fetched = []
    files = buckets.storage()
    get_file = files.get_file
    monkeypatch.setattr(files, "get_file", lambda *args: (fetched.append(args[0]), get_file(*args)))
    download("gs://bkt/one", target)
    assert fetched == []
    put("gs://bkt/one/a.txt", b"c")  # of the same size
    buckets.storage().rm_file("bkt/one/deep/b.txt")
    download("gs://bkt/one", target)
    assert fetched == ["bkt/one/a.txt"]
    assert (target / "a.txt").read_bytes() == b"c"
    assert not (target / "deep" / "b.txt").exists()


def test_what_is_not_there_and_what_does_not_fit_are_errors(bucket, monkeypatch):
    with pytest.raises(PlaceError, match="gs://bkt/none: there is nothing at this address"):
        local("gs://bkt/none")
    put("gs://bkt/large/x", b"x" * 1000)
    monkeypatch.setattr(buckets, "free_bytes", lambda _: 999)
    with pytest.raises(PlaceError, match="UDM_GRPO_CACHE"):
        local("gs://bkt/large")


def test_prompts_are_a_file_or_a_split_of_a_folder(bucket):
    put("gs://bkt/prompts/train.txt", b"a dog\n")
    put("gs://bkt/prepared/udm_grpo_prompts/x", b"x")
    assert Path(local_prompts("gs://bkt/prompts/train.txt")).read_text() == "a dog\n"
    folder, colon, split = local_prompts("gs://bkt/prepared:train").rpartition(":")
    assert (Path(folder) / "udm_grpo_prompts" / "x").is_file()
    assert colon + split == ":train"
    assert local_prompts("data/geneval:train") == "data/geneval:train"


def test_a_mirror_uploads_what_changes_and_brings_it_back(bucket, monkeypatch):
    put("gs://bkt/run/checkpoints/00000001/x", b"x")
    put("gs://bkt/run/export/x", b"x")
    with Mirror("gs://bkt/run/") as mirror:
        assert not list(mirror.folder.iterdir())
        (mirror.folder / "metrics.jsonl").write_text("1\n")
        (mirror.folder / "pictures").mkdir()
        (mirror.folder / "pictures" / "0.png").write_bytes(b"png")
        (mirror.folder / ".x.unfinished").write_text("half")
        mirror.push()
        with (mirror.folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        mirror.push_when_due()
        assert listing("gs://bkt/run/metrics.jsonl")[""]["size"] == 2
        monkeypatch.setattr(buckets, "PUSH_EVERY_S", 0)
        mirror.push_when_due()
        assert listing("gs://bkt/run/metrics.jsonl")[""]["size"] == 4
        (mirror.folder / "metrics.jsonl").rename(mirror.folder / "metrics.jsonl.1")
    shutil.rmtree(mirror.folder)  # another machine
    again = Mirror("gs://bkt/run")
    there = sorted(path.relative_to(again.folder).as_posix() for path in again.folder.rglob("*") if path.is_file())
    assert there == ["metrics.jsonl.1", "pictures/0.png"]
    assert set(listing("gs://bkt/run")) == {*there, "checkpoints/00000001/x", "export/x"}
    put("gs://bkt/run/checkpoints/00000001/commit_success.txt", b"")
    (again.folder / "config.json").write_text("{}")
    assert set_aside(again.folder, "gs://bkt/run") == "gs://bkt/run/older/1"
    again.push()
    moved = (
        "checkpoints/00000001/x",
        "checkpoints/00000001/commit_success.txt",
        "export/x",
        "pictures/0.png",
        "config.json",
    )
    assert set(listing("gs://bkt/run")) == {"metrics.jsonl.1", *(f"older/1/{name}" for name in moved)}
    third = Mirror("gs://bkt/run")
    assert [path.name for path in third.folder.iterdir()] == ["metrics.jsonl.1"]
    (third.folder / "config.json").write_text("{}")
    assert set_aside(third.folder, "gs://bkt/run") == "gs://bkt/run/older/2"


def test_a_bucket_that_fails_is_a_warning_on_the_way_and_an_error_at_the_end(bucket, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no route to host")

    mirror = Mirror("gs://bkt/failing")
    monkeypatch.setattr(buckets.storage(), "pipe_file", fail)
    monkeypatch.setattr(buckets, "PUSH_EVERY_S", 0)
    (mirror.folder / "x").write_text("x")
    mirror.push_when_due()
    assert "warning: gs://bkt/failing: the bucket cannot be used (OSError: no route" in capsys.readouterr().err
    with pytest.raises(PlaceError, match="credentials"), mirror:
        pass
    with pytest.raises(ZeroDivisionError), mirror:
        _ = 1 / 0


def test_checkpoints_in_a_bucket(bucket):
    folder = "gs://bkt/saved/checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.full(9, step), "y": jnp.ones(3)}, {"step": step})
    assert checkpoints.steps() == [2]
    state, meta = checkpoints.restore(2, {"x": np.zeros(9, np.int32), "y": np.zeros(3, np.float32)})
    assert state["x"].tolist() == [2] * 9
    assert meta == {"step": 2}
    assert str(resolve_resume("latest", folder)) == f"{folder}/00000002"
    assert str(resolve_resume("gs://bkt/saved", "gs://bkt/other")) == f"{folder}/00000002"
    assert [str(path) for path in checkpoints.set_aside_after(1)] == [f"{folder}/00000002.aside-1"]
    assert checkpoints.steps() == []
    assert "00000002.aside-1/commit_success.txt" in listing(folder)
    assert not any(name.startswith("00000002/") for name in listing(folder))


def test_a_lock_in_a_bucket_keeps_others_out_and_goes(bucket, monkeypatch):
    for name in ("POLL_S", "BUSY_S", "SETTLE_S"):
        monkeypatch.setattr(folder_lock, name, 0.05)
    monkeypatch.setattr(LockObject, "beat_s", 0.05)
    refused = []

    def enter():
        try:
            with lock_output("gs://bkt/locked"):
                pass
        except FolderLockedError as error:
            refused.append(str(error))

    with lock_output("gs://bkt/locked"):
        other = threading.Thread(target=enter)
        other.start()
        other.join()
        content = buckets.storage().cat_file("bkt/locked/.lock")
    assert "remove gs://bkt/locked/.lock" in refused[0]
    assert not listing("gs://bkt/locked")
    put("gs://bkt/locked/.lock", content.replace(b'"started": "', b'"started": "0'))  # of a process that has ended
    enter()
    assert len(refused) == 1
    assert not listing("gs://bkt/locked")


RUN = "gs://bkt/runs/first"
OVERRIDES = (
    "model.path=gs://bkt/models/ursa-shapes",
    "prompts.train=gs://bkt/prompts/train.jsonl",
    "prompts.heldout=gs://bkt/prompts/heldout.jsonl",
    "iterations=2",
    "checkpoint.every=1",
    "optimizer.schedule=constant",
    "evaluation.final_prompts=3",
)


def lines(address):
    objects = listing(address)
    text = buckets.storage().cat_file(address.removeprefix("gs://")).decode() if objects else ""
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_in_a_bucket_is_killed_and_goes_on_elsewhere(bucket, tmp_path, capsys, monkeypatch):
    """Its model and prompts are in the bucket, and it has its own process; then it gets a report and a picture."""
    put_folder(ASSETS / "ursa-shapes", "gs://bkt/models/ursa-shapes")
    put_folder(ASSETS / "shapes-prompts", "gs://bkt/prompts")
    environment = running.environment() | bucket
    words = running.command(RUN, *OVERRIDES)
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(words, cwd=running.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    while "checkpoints/00000001/commit_success.txt" not in listing(RUN):
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = lines(f"{RUN}/metrics.jsonl")[0]
    environment["UDM_GRPO_CACHE"] = str(tmp_path / "another machine")
    again = [*words, "--config.checkpoint.resume=latest"]
    done = subprocess.run(again, cwd=running.ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"results in {RUN}" in done.stderr + done.stdout
    there = set(listing(RUN))
    assert {"summary.json", "report.html", "export/model_index.json", "pictures/000002.png"} < there
    assert "checkpoints/00000002/commit_success.txt" in there
    after = lines(f"{RUN}/metrics.jsonl")
    assert [line["step"] for line in after] == [1, 2]
    assert after[0] == before  # brought back, not made again
    assert len(json.loads(buckets.storage().cat_file(f"{RUN[5:]}/environment.json"))["starts"]) == 2
    monkeypatch.chdir(tmp_path)
    assert report.main([RUN]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    drawing = ["--run", RUN, "--prompt", "a photo of a red circle", "--images-per-prompt", "1", "--steps", "2"]
    assert sample.main([*drawing, "--output", "pictures"]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "pictures" / "00000" / "samples").glob("*.png"))) == 1
    assert not list(tmp_path.glob("gs:*"))
    assert not list(running.ROOT.glob("gs:*"))

"""Files in Google Cloud Storage buckets (gs://...): read through a local cache, written from a local folder.

    folder = local("gs://bucket/models/URSA-1.7B-IBQ512")   # downloaded once; a local path is returned as is
    mirror = Mirror("gs://bucket/runs/first")               # mirror.folder is local; push() uploads changed files

A bucket has no folders, appends or renames, so a file is uploaded as one object, which readers see whole or not at all.
Checkpoints do not pass through here: Orbax writes them to the bucket itself.

Credentials are Google's application default credentials (`gcloud auth application-default login`; on a VM, its service
account). STORAGE_EMULATOR_HOST is the address of an emulator (for Orbax also TENSORSTORE_GCS_HTTP_URL).
"""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from udm_grpo.files.atomic import UNFINISHED, replace_file
from udm_grpo.files.disk_space import free_bytes
from udm_grpo.files.folder_lock import NAME as LOCK
from udm_grpo.files.places import PlaceError, is_bucket, with_home
from udm_grpo.machine.progress import progress_bar

PUSH_EVERY_S = 60.0
"""Seconds between two uploads of changed files during training."""
NOT_MIRRORED = ("wandb",)
"""Folders of a run that are not uploaded: Weights & Biases uploads its own."""
CHECKPOINTS, EXPORTS, OLDER = "checkpoints", "export", "older"
"""Parts of a run in a bucket that are not downloaded: checkpoints, folders with names like export*, older runs."""
NOT_BROUGHT_BACK = (f"{CHECKPOINTS}/", EXPORTS, f"{OLDER}/", LOCK)

COMMIT_FILE = "commit_success.txt"
"""The file that Orbax writes last into a checkpoint."""


def cache_folder() -> Path:
    """Return the local folder for copies of files in buckets: UDM_GRPO_CACHE, or ~/.cache/udm_grpo."""
    variable = "UDM_GRPO_CACHE"
    return Path(with_home(variable, os.environ.get(variable) or "~/.cache/udm_grpo"))


@functools.cache
def storage() -> Any:
    """Return the client of Google Cloud Storage, one per process."""
    import fsspec

    # Other processes write to the bucket too, so listings must not be cached.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def talking(address: str) -> Iterator[None]:
    """Turn errors of the client library into a PlaceError with the address and what to check."""
    try:
        yield
    except PlaceError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise PlaceError(
            f"{address}: the bucket cannot be used ({type(error).__name__}: {text}). Check the address, the "
            "credentials (gcloud auth application-default login, or the service account of the VM) and their rights on "
            "the bucket."
        ) from error


def listing(address: str) -> dict[str, dict[str, Any]]:
    """Return the objects at an address and below it: path relative to it ("" for the object itself) -> its details."""
    with talking(address):
        root = address.removeprefix("gs://").rstrip("/")
        try:
            objects = storage().find(root, detail=True)
        except FileNotFoundError:
            objects = {}
    return {name.removeprefix(root).lstrip("/"): info for name, info in objects.items() if not name.endswith("/")}


def exists(address: str) -> bool:
    """Return whether there is an object at this address or below it."""
    return bool(listing(address))


def local(address: str | Path, skip: tuple[str, ...] = ()) -> Path:
    """Return a local path for an address: of a bucket a copy in the cache, any other path as it is.

    A file is downloaded again if the bucket holds another version of it. skip: top-level folders to leave out, by the
    beginnings of their names. Raises PlaceError, also if nothing is there or the disk is too small.
    """
    return _cached(str(address), skip) if is_bucket(address) else Path(with_home("the path", str(address)))


def local_prompts(place: str) -> str:
    """Return `local` of a prompt set: a file, or a prepared folder with or without :split."""
    if not is_bucket(place):
        return with_home("the prompt set", place)
    folder, colon, split = place.rpartition(":")
    if split.isidentifier() and not exists(place):
        return f"{local(folder)}{colon}{split}"
    return str(local(place))


@functools.cache
def _cached(address: str, skip: tuple[str, ...]) -> Path:
    target = _place("copies", address)
    download(address, target, skip)
    return target


def _place(kind: str, address: str) -> Path:
    """Return the folder of the cache for an address; it ends in the address's own name."""
    address = address.rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    return cache_folder() / kind / digest / address.rpartition("/")[2]


def download(address: str, target: Path, skip: tuple[str, ...] = ()) -> dict[str, Path]:
    """Make `target` an exact copy of what is at an address; return its files by relative path."""
    objects = {name: info for name, info in listing(address).items() if not name or not name.startswith(skip or ("/",))}
    if not objects:
        raise PlaceError(f"{address}: there is nothing at this address; check its spelling with gcloud storage ls.")
    files = {name: target / name if name else target for name in objects}
    marks = {name: _place("marks", f"{address}/{name}") for name in objects}
    missing = [name for name, path in files.items() if not _same(path, marks[name], objects[name])]
    size, free = sum(objects[name]["size"] for name in missing), free_bytes(target)
    if free is not None and size > free:
        raise PlaceError(
            f"{address}: a copy needs {size / 2**30:,.1f} GiB in {cache_folder()}, which has {free / 2**30:,.1f} GiB "
            "free; free some space there, or set UDM_GRPO_CACHE to a folder on a larger disk."
        )
    _clear(target, set(files.values()))
    with progress_bar(len(missing), f"downloading {address}", "file") as bar:
        for name in missing:
            source = f"{address.rstrip('/')}/{name}".rstrip("/").removeprefix("gs://")
            with talking(address):
                replace_file(files[name], lambda temporary, source=source: storage().get_file(source, str(temporary)))
            mark = _version(objects[name])
            replace_file(marks[name], partial(Path.write_text, data=mark, encoding="utf-8"))
            bar.update()
    return files


def _version(info: dict[str, Any]) -> str:
    return f"{info.get('generation')} {info.get('md5Hash') or info.get('crc32c') or info.get('etag')}"


def _same(path: Path, mark: Path, info: dict[str, Any]) -> bool:
    """Return whether a file was downloaded from this version of an object."""
    if not path.is_file() or path.stat().st_size != info["size"] or not mark.is_file():
        return False
    return mark.read_text(encoding="utf-8") == _version(info)


def _clear(target: Path, keep: set[Path]) -> None:
    """Delete the files of a copy that are not in `keep`."""
    if target.is_file() and target not in keep:
        target.unlink()
    for path in target.rglob("*") if target.is_dir() else []:
        if path.is_file() and path not in keep and not path.name.endswith(UNFINISHED):
            path.unlink(missing_ok=True)


class Mirror:
    """A local folder that is mirrored to a bucket; it starts as a copy of the bucket's files.

    Checkpoints, exports and older runs are not downloaded. Files that are deleted here are deleted there.
    Raises PlaceError if the bucket cannot be used.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.folder = staging(address, 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._last = time.monotonic()
        if any(not name.startswith(NOT_BROUGHT_BACK) for name in listing(self.address)):
            download(self.address, self.folder, NOT_BROUGHT_BACK)
            self._pushed = self._here()

    def push(self) -> None:
        """Upload every file that has changed, and delete in the bucket what was deleted here."""
        here = self._here()
        with talking(self.address):
            for name in sorted(here):
                if self._pushed.get(name) != here[name]:
                    self._upload(name)
                    self._pushed[name] = here[name]
            for name in sorted(self._pushed.keys() - here.keys()):
                with contextlib.suppress(FileNotFoundError):
                    storage().rm_file(self._remote(name))
                del self._pushed[name]
        self._last = time.monotonic()

    def push_when_due(self) -> None:
        """Call `push` if the last one was PUSH_EVERY_S ago; a failure is a warning, and is retried later."""
        if time.monotonic() - self._last < PUSH_EVERY_S:
            return
        try:
            self.push()
        except PlaceError as error:
            self._last = time.monotonic()
            print(f"warning: {error} It will be retried.", file=sys.stderr)

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Push the files; if an error is ending the run, a failure to push is only a warning."""
        try:
            self.push()
        except PlaceError as error:
            if kind is None:
                raise
            print(f"warning: {error}", file=sys.stderr)

    def _upload(self, name: str) -> None:
        path = self.folder / name
        try:
            if path.stat().st_size < 2**26:  # read first, since it may still grow
                storage().pipe_file(self._remote(name), path.read_bytes())
            else:
                storage().put_file(str(path), self._remote(name))
        except FileNotFoundError:  # it was replaced meanwhile; the next push uploads it
            if path.exists():
                raise

    def _remote(self, name: str) -> str:
        return f"{self.address.removeprefix('gs://')}/{name}"

    def _here(self) -> dict[str, tuple[int, int]]:
        files = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and name.parts[0] not in NOT_MIRRORED and not path.name.endswith(UNFINISHED):
                stat = path.stat()
                files[name.as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return files


def staging(address: str, process: int) -> Path:
    """Return a process's local folder for a run's folder in a bucket; that of process 0 is mirrored."""
    return _place(f"runs-{process}" if process else "runs", address)


def copy_object(source: str, target: str) -> None:
    """Copy an object within the storage service."""
    with talking(source):
        storage().cp_file(source.removeprefix("gs://"), target.removeprefix("gs://"))


def move_objects(source: str, target: str) -> None:
    """Move everything at an address to another one: everything is copied before anything is deleted.

    The file that commits a checkpoint is copied last and deleted first, so that an incomplete checkpoint never counts.
    """
    names = sorted(listing(source), key=lambda name: name.endswith(COMMIT_FILE))
    for name in names:
        copy_object(f"{source}/{name}".rstrip("/"), f"{target}/{name}".rstrip("/"))
    with talking(source):
        for name in reversed(names):
            storage().rm_file(f"{source}/{name}".rstrip("/").removeprefix("gs://"))

"""Allow one writer at a time in an output folder, also when several machines share the disk.

    with locked(LockFile(output / NAME), str(output)):        # write to the folder here

The lock is a small file that says who holds it (host, process id, command) and changes every few seconds. The lock of
an interrupted process does not block for long: on the same machine its process id shows at once that it has ended, and
from another machine the lock is taken over after SILENT_S without a change. Clocks are not compared: a waiting process
counts how often it read the file unchanged, so that neither a wrong clock nor a hanging disk takes a lock away. A
holder that was wrongly considered dead (it was suspended) notices this and ends without writing anything more.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rewards_bridge.errors import UserError
from udm_grpo.multihost.process_identity import process_identity, runs_here

NAME = ".lock"
"""Name of the lock file in a folder."""
POLL_S = 1.0
"""Seconds between two reads of a lock that is held."""
LISTEN_S = 0.1
"""Seconds between two checks of a waiting process whether it was asked to stop."""
BUSY_S = 30.0
"""Seconds to wait for a process that is known to run."""
SILENT_S = 60.0
"""Seconds without a change after which another machine takes a lock over; see `LockPlace.beat_s`."""
SETTLE_S = 1.0
"""Seconds to wait after taking over: another process may have done the same, and the last one wins."""
WAIT_VARIABLE = "UDM_GRPO_LOCK_WAIT_S"
_BYTES = 1024
"""Size of every lock file: it is rewritten in place."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)
_threads: dict[str, int] = {}
"""Lock -> the thread of this process that holds it."""


class FolderLockedError(UserError, OSError):
    """Another process writes to the folder; the message says which, and what to do."""


class WaitStoppedError(Exception):
    """This process was asked to stop while it waited for another one to release a folder."""


class LockPlace(Protocol):
    """Where a lock is kept: in a file or, for a run in a bucket, in an object."""

    name: str
    beat_s: float
    """Seconds between two changes by its holder."""

    def create(self, content: bytes) -> bool:
        """Create it; return False if it exists."""

    def read(self) -> bytes | None:
        """Return its content; None if it does not exist."""

    def replace(self, content: bytes) -> None:
        """Take it over from its holder."""

    def refresh(self, token: bytes, content: bytes) -> bool:
        """Replace the content if it holds `token`; return False if it holds another one."""

    def remove(self, token: bytes) -> None:
        """Remove it if it holds `token`, with the folders that were created for it and are empty otherwise."""


class LockFile:
    """A lock in a file on a local or shared disk."""

    beat_s = 5.0

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self._created: list[Path] = []

    def create(self, content: bytes) -> bool:
        """Create the file and its folder; a link is atomic also on NFS."""
        missing = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{self.path.parent}: Not a directory; give a folder for the results") from None
        self._created = self._created or missing
        draft = self._draft(content)
        try:
            os.link(draft, self.path)
            return True
        except FileExistsError:
            return draft.stat().st_nlink == 2  # NFS: it was created, but the answer was lost and the call repeated
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        finally:
            draft.unlink(missing_ok=True)
        try:
            with self.path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def read(self) -> bytes | None:
        """Read the file again: opening it makes NFS ask the server."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, content: bytes) -> None:
        """Put a new file in its place."""
        draft = self._draft(content)
        try:
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)

    def refresh(self, token: bytes, content: bytes) -> bool:
        """Write into the same file that was verified to be ours; create it again if someone removed it."""
        try:
            opened = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return not self.path.parent.is_dir() or self.create(content)
        try:
            if token not in os.read(opened, 2 * _BYTES):
                return False
            os.pwrite(opened, content, 0)
        finally:
            os.close(opened)  # which sends it to the server
        return True

    def remove(self, token: bytes) -> None:
        """Remove it, and the folders that were created for it if they are empty."""
        if token in (self.read() or b""):
            self.path.unlink(missing_ok=True)
        for folder in self._created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def _draft(self, content: bytes) -> Path:
        draft = self.path.with_name(f"{self.path.name}.{unique_name()}")
        draft.write_bytes(content)
        return draft


def unique_name() -> str:
    """Return a name that no other process on any host generates: host, process id and a random number."""
    host = "".join(letter for letter in socket.gethostname()[:24] if letter.isalnum() or letter == "-")
    return f"{host}-{os.getpid()}-{secrets.token_hex(6)}"


def short_name(path: Path) -> str:
    """Return the name of a file for use in another name, of 100 bytes at most: systems allow 255."""
    if len(os.fsencode(path.name)) <= 100:
        return path.name
    return f"{path.name[:20]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}"


@dataclass
class Lock:
    """A lock that this process holds."""

    place: LockPlace
    folder: str
    token: bytes
    taken_by: str = ""
    """The process that took it away, if one did."""

    def check(self) -> None:
        """Raise FolderLockedError if another process has taken the lock away: nothing may be written any more."""
        if self.taken_by:
            raise FolderLockedError(self.lost_text())

    def lost_text(self) -> str:
        """Return the message about a lock that was taken away."""
        return (
            f"{self.folder} was taken over by {self.taken_by}, because this process had stopped updating its lock (it "
            "was suspended, or the disk did not answer). It ends without writing anything more."
        )


@contextlib.contextmanager
def locked(
    place: LockPlace, folder: str, end: bool = True, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Lock]:
    """Hold the lock of a folder inside the block; a thread that already holds it just continues.

    folder: its name in messages. end: whether this process exits, with status 1, if the lock is taken away from it; if
    not, `Lock.check` raises. stopped: whether this process was asked to stop, for one that only records its signals.

    Waits up to BUSY_S (UDM_GRPO_LOCK_WAIT_S) for a process that runs. Raises FolderLockedError if that still holds the
    lock then, WaitStoppedError as soon as `stopped` returns True during the wait, and OSError if nothing can be
    written.
    """
    token = secrets.token_hex(16).encode()
    lock = Lock(place, folder, token)
    if _threads.get(place.name) == threading.get_ident():
        yield lock
        return
    identity = process_identity()
    _acquire(lock, _content(identity, token, 0), stopped)
    _threads[place.name] = threading.get_ident()
    released = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, identity, released, end), daemon=True, name="folder-lock")
    beating.start()
    try:
        yield lock
    finally:
        released.set()
        beating.join()
        _threads.pop(place.name, None)
        with contextlib.suppress(OSError):  # another process will take it over
            place.remove(token)


def _acquire(lock: Lock, content: bytes, stopped: Callable[[], bool]) -> None:
    """Wait until the lock is ours; see `locked`."""
    busy_s = _busy_s()
    before: bytes | None = None
    polls = unchanged = 0
    beats = said = False
    while not lock.place.create(content):
        seen = lock.place.read()
        if seen is None:
            continue
        if before is not None:
            beats, unchanged = beats or seen != before, unchanged + 1 if seen == before else 0
        before, holder = seen, _holder(seen)
        alive = runs_here(holder)
        silent = alive is None and unchanged * POLL_S >= SILENT_S
        if alive is False or silent:
            if _take_over(lock, content, seen, "has ended" if alive is False else f"was silent for {SILENT_S:g} s"):
                return
            continue
        if (alive or beats) and polls * POLL_S >= busy_s:
            raise FolderLockedError(_busy_text(lock, holder))
        if not said:
            wait = busy_s if alive else SILENT_S
            print(f"{lock.folder} is in use by {_name(holder)}; waiting for up to {wait:g} s", file=sys.stderr)
            said = True
        polls += 1
        _pause(POLL_S, stopped)


def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, and check every LISTEN_S whether this process was asked to stop; raise WaitStoppedError if so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise WaitStoppedError
        time.sleep(min(left, LISTEN_S))


def _take_over(lock: Lock, content: bytes, seen: bytes, why: str) -> bool:
    """Take the lock of a dead process; return False if another process did so at the same time."""
    if lock.place.read() != seen:
        return False
    lock.place.replace(content)
    time.sleep(SETTLE_S)
    if lock.token not in (lock.place.read() or b""):
        return False
    print(
        f"warning: {lock.folder} was in use by {_name(_holder(seen))}, which {why}; continuing there", file=sys.stderr
    )
    return True


def _beat(lock: Lock, identity: dict[str, Any], released: threading.Event, end: bool) -> None:
    """Change the lock regularly, and notice when another process has taken it."""
    count = 0
    while not released.wait(lock.place.beat_s):
        count += 1
        try:
            ours = lock.place.refresh(lock.token, _content(identity, lock.token, count))
            taken_by = "" if ours else _name(_holder(lock.place.read() or b""))
        except Exception:  # a disk or a network that does not answer now may do so the next time
            continue
        if ours:
            continue
        lock.taken_by = taken_by
        if end:
            print(f"error: {lock.lost_text()}", file=sys.stderr, flush=True)
            os._exit(1)  # other threads may still write
        return


def _content(identity: dict[str, Any], token: bytes, count: int) -> bytes:
    text = json.dumps({**identity, "token": token.decode(), "beat": count})
    return text.encode().ljust(_BYTES - 1) + b"\n"


def _holder(content: bytes) -> dict[str, Any]:
    """Return what a lock says about its holder; {} if it cannot be read."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    said = {name: str(holder.get(name, "unknown")) for name in ("command", "pid", "host", "since")}
    return f"{said['command']} (process {said['pid']} on {said['host']}, since {said['since']})"


def _busy_text(lock: Lock, holder: dict[str, Any]) -> str:
    return (
        f"{lock.folder} is in use by {_name(holder)}. Two processes would overwrite each other's files: wait "
        f"until it ends, end it (on {holder.get('host')}: kill {holder.get('pid')}), or choose another output folder. "
        f"If you are sure that it no longer runs, remove {lock.place.name}."
    )


def _busy_s() -> float:
    text = os.environ.get(WAIT_VARIABLE, "")
    try:
        seconds = float(text) if text else BUSY_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"the environment variable {WAIT_VARIABLE} is {text!r}; give a number of seconds, or unset it.")
    return seconds


def lock_beside(target: Path, end: bool = True) -> contextlib.AbstractContextManager[Lock]:
    """Hold the lock of a folder or file that is replaced as a whole; it is beside the target, as .NAME.lock."""
    target = Path(os.path.realpath(target))
    return locked(LockFile(target.with_name(f".{short_name(target)}{NAME}")), str(target), end)


def lock_inside(folder: Path, stopped: Callable[[], bool] = lambda: False) -> contextlib.AbstractContextManager[Lock]:
    """Hold the lock of a folder to which files are added; `stopped` is that of `locked`."""
    folder = Path(os.path.realpath(folder))
    return locked(LockFile(folder / NAME), str(folder), stopped=stopped)

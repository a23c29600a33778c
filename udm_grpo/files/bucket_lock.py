"""The lock of a run in a bucket: an object that its holder keeps changing; see folder_lock.py."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from udm_grpo.files import buckets
from udm_grpo.files.folder_lock import NAME, Lock, lock_inside, locked
from udm_grpo.files.places import PlaceError, is_bucket


class LockObject:
    """A lock in an object of a bucket; `create` relies on the storage creating it only if it does not exist."""

    beat_s = 15.0  # Google Cloud Storage takes about one change of an object a second

    def __init__(self, address: str):
        self.name = address
        self._path = address.removeprefix("gs://")

    def create(self, content: bytes) -> bool:
        """Create the object; return False if it exists."""
        if self.read() is not None:
            return False
        with buckets.talking(self.name):
            try:
                buckets.storage().pipe_file(self._path, content, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if getattr(error, "code", None) == 412 or "conditionNotMet" in str(error):
                    return False
                raise
        return True

    def read(self) -> bytes | None:
        """Download the object."""
        with buckets.talking(self.name):
            try:
                return buckets.storage().cat_file(self._path)
            except FileNotFoundError:
                return None

    def replace(self, content: bytes) -> None:
        """Upload the object, regardless of the lock's holder."""
        with buckets.talking(self.name):
            buckets.storage().pipe_file(self._path, content)

    def refresh(self, token: bytes, content: bytes) -> bool:
        """Upload the object if it is still ours; create it again if someone removed it."""
        there = self.read()
        if there is None:
            return self.create(content)
        if token in there:
            self.replace(content)
            return True
        return False

    def remove(self, token: bytes) -> None:
        """Delete the object if it is ours."""
        with contextlib.suppress(PlaceError):  # another process will take it over
            if token in (self.read() or b""):
                with buckets.talking(self.name):
                    buckets.storage().rm_file(self._path)


def lock_output(
    place: str | Path, stopped: Callable[[], bool] = lambda: False
) -> contextlib.AbstractContextManager[Lock]:
    """Hold the lock of an output folder, which may be in a bucket; see `folder_lock.locked`."""
    if is_bucket(place):
        return locked(LockObject(f"{str(place).rstrip('/')}/{NAME}"), str(place), stopped=stopped)
    return lock_inside(Path(place), stopped)

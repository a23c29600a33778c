"""Errors that come of the environment, not of a package or its files: no home, an id without a name, full disks."""

from __future__ import annotations

import errno
import os
import tempfile

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def environment_advice(error: BaseException) -> str:
    """Return what to set in the environment for an error (or one that it came from); empty if that is not the reason.

    Packages write caches under HOME or the temporary folder when they are imported, and ask for the user's name.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NOT_WRITABLE:
            return (
                f"a file cannot be read or written ({_first_line(seen)}). Packages keep files under HOME "
                f"({_value('HOME')}), XDG_CACHE_HOME ({_value('XDG_CACHE_HOME')}) and the temporary folder (TMPDIR, "
                f"here {_temporary()}): set these to folders with room that this user may write to"
            )
        if isinstance(seen, FileNotFoundError) and "temporary directory" in str(seen):
            return f"no temporary folder can be written to; set TMPDIR ({_value('TMPDIR')}) to one"
        if "getpwuid" in str(seen) or "username is set in the environment" in str(seen):
            return f"this user id ({os.getuid()}) has no name; set USER and HOME, as in USER=me HOME=/tmp/me"
        if isinstance(seen, RuntimeError) and "home directory" in str(seen):
            return f"there is no home folder; set HOME ({_value('HOME')}) to a folder that this user may write to"
        seen = seen.__cause__ or seen.__context__
    return ""


def _value(name: str) -> str:
    return os.environ.get(name) or "not set"


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return "none that works"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

"""Errors caused by the environment, not by a package: no home folder, a user id without a name, a full disk."""

from __future__ import annotations

import errno
import os
import tempfile

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


def environment_advice(error: BaseException) -> str:
    """Return what to set in the environment to fix an error (or its cause); "" if the environment is not the reason.

    Packages write caches under HOME or the temporary folder when they are imported, and look up the user's name.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NOT_WRITABLE:
            return (
                f"a file cannot be read or written ({_first_line(seen)}). Packages keep files under HOME "
                f"({_value('HOME')}), XDG_CACHE_HOME ({_value('XDG_CACHE_HOME')}) and the temporary folder (TMPDIR, "
                f"here {_temporary()}): set these to writable folders with free space"
            )
        if isinstance(seen, FileNotFoundError) and "temporary directory" in str(seen):
            return f"no temporary folder is writable; set TMPDIR ({_value('TMPDIR')}) to one that is"
        if "getpwuid" in str(seen) or "username is set in the environment" in str(seen):
            return f"this user id ({os.getuid()}) has no name; set USER and HOME, as in USER=me HOME=/tmp/me"
        if isinstance(seen, RuntimeError) and "home directory" in str(seen):
            return f"there is no home folder; set HOME ({_value('HOME')}) to a writable folder"
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

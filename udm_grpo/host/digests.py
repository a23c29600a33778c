"""SHA-256 of what files hold, wherever they are: the same for a copy, another for any other content."""

import hashlib
from pathlib import Path


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 over the names and the whole content of every file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{whole}\n".encode())
    return digest.hexdigest()

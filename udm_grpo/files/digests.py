"""SHA-256 digests of files by their content, wherever they are.

Of files above 64 MiB, which are weights, only a sample is read, so that a start does not wait for gigabytes: the size,
the first and the last MiB (the directory of a .bin is at its end, with a CRC-32 of every tensor), 256 blocks spread
evenly, and of safetensors the header and the beginning, the middle and the end of every tensor. Another model or
another training run changes all of these. A change of a few numbers of a large file by hand is not detected.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

WHOLE_BYTES = 64 << 20
"""Files up to this size are read whole."""
EDGE_BYTES, BLOCK_BYTES, BLOCKS = 1 << 20, 1 << 12, 256
MAX_FILES = 10_000
"""A folder with more files than this is digested by names and sizes only."""


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 over the names and the whole content of every file below a folder."""
    return _joined(f"{path.relative_to(folder).as_posix()}\0{_whole(path)}" for path in _files(folder, hidden=True))


def digest_path(path: Path) -> str:
    """Return the digest of a file, or of a folder with its file names; hidden files and documentation do not count.

    Large files are sampled, see the module docstring.
    """
    if path.is_file():
        return digest_file(path)
    files = _files(path, hidden=False)
    few = len(files) <= MAX_FILES
    return _joined(
        f"{file.relative_to(path).as_posix()}\0{digest_file(file) if few else file.stat().st_size}" for file in files
    )


def digest_files(paths: Iterable[Path]) -> str:
    """Return the digest of files in any order and under any names; large ones are sampled."""
    return _joined(sorted(digest_file(path) for path in paths))


def digest_json(values: Iterable[Any]) -> str:
    """Return the SHA-256 of JSON values in their order; the order of an object's keys does not count."""
    return _joined(json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values)


def digest_array(array: np.ndarray) -> str:
    """Return the SHA-256 of all numbers of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, or of the size and a sample of a large file."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return _whole(path)
    digest = hashlib.sha256(f"sample of {size}".encode())
    with path.open("rb") as file:
        for start, length in sorted(set(_sample(file, path, size))):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joined(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _files(folder: Path, hidden: bool) -> list[Path]:
    """Return the files below a folder in order; without `hidden`, hidden files and documentation are left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if hidden:
        return files
    return [path for path in files if path.suffix != ".md" and not _is_hidden(path.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sample(file: BinaryIO, path: Path, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of every part of a large file that is read."""
    yield 0, EDGE_BYTES
    yield size - EDGE_BYTES, EDGE_BYTES
    yield from ((size * at // BLOCKS, BLOCK_BYTES) for at in range(BLOCKS))
    if path.suffix != ".safetensors":
        return
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size:
        return  # damaged, which loading the file will report
    yield 0, 8 + length
    try:
        header = json.loads(file.read(length))
        spans = [part["data_offsets"] for name, part in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for begin, end in spans:
        last = max(begin, end - BLOCK_BYTES)
        for start in (begin, (begin + last) // 2, last):
            yield 8 + length + start, min(BLOCK_BYTES, end - begin)

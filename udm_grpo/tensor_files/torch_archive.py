"""Read and write files of torch.save without torch: zip archives of PyTorch 1.6 and later; older files are only read.

An archive holds the pickle of a state dict and, uncompressed, the numbers of each storage in an entry of its own, so
that any rows of a tensor can be read directly.
"""

import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16
import numpy as np

from udm_grpo.machine.progress import progress_bar
from udm_grpo.tensor_files import tensor_pickle
from udm_grpo.tensor_files.tensor_pickle import PickleError, Storage, StoredTensor
from udm_grpo.tensor_files.weight_table import TensorInfo

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""Content of the first pickle in a file of PyTorch before 1.6."""
MAX_PICKLE_BYTES = 256 << 20
ALIGNMENT = 64
"""Bytes; the numbers of a storage begin at a multiple of this, as torch.save writes them."""


class ArchiveError(ValueError):
    """A file that is damaged."""


class ContentError(ArchiveError):
    """A file with content that is not supported here; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """An open file: its tensors by name, and the position of each storage."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    starts: Mapping[str, int]
    """Key of a storage -> position in bytes."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor."""
        return {name: TensorInfo(tensor.shape, tensor.storage.dtype) for name, tensor in self.tensors.items()}

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        """Return rows of a tensor, reading nothing else from the file; a scalar is returned whole."""
        tensor = self.tensors[name]
        dtype, offset, shape = np.dtype(tensor.storage.dtype), tensor.offset, tensor.shape
        if shape:
            begin, end, _ = rows.indices(shape[0])
            offset, shape = offset + begin * tensor.strides[0], (max(end - begin, 0), *shape[1:])
        if 0 in shape:
            return np.empty(shape, dtype)
        span = 1 + sum((count - 1) * stride for count, stride in zip(shape, tensor.strides, strict=True))
        at = self.starts[tensor.storage.key] + offset * dtype.itemsize
        if span == int(np.prod(shape)) and _is_contiguous(shape, tensor.strides):
            return np.fromfile(self.path, np.uint8, span * dtype.itemsize, offset=at).view(dtype).reshape(shape)
        # Only the pages that are needed are read.
        mapped = np.memmap(self.path, np.uint8, "r", at, (span * dtype.itemsize,))
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.ndarray(shape, dtype, mapped, 0, strides).copy()


def open_archive(path: Path) -> Archive:
    """Open a .bin or .pth file without reading its numbers.

    Raises ArchiveError for a damaged file, ContentError for one that holds anything but a dict of tensors by name,
    ForbiddenError for one that names anything but tensors and containers, and OSError.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        size = file.seek(0, os.SEEK_END)
    try:
        content, starts = _open_zip(path) if zipped else _open_legacy(path)
    except (ArchiveError, OSError, tensor_pickle.ForbiddenError):
        raise
    except PickleError as error:
        raise ArchiveError(str(error)) from None
    except Exception as error:  # zipfile raises arbitrary types for bytes that are not an archive
        raise ArchiveError(f"not an archive: {error or type(error).__name__}") from None
    tensors = _state_dict(content)
    for name, tensor in tensors.items():
        stored = tensor.storage
        length = stored.size * np.dtype(stored.dtype).itemsize
        begin, end = starts.get(stored.key, (0, -1))
        if begin + length > min(end, size):
            raise ArchiveError(f"the numbers of {name[:200]} are incomplete")
    return Archive(path, tensors, {key: begin for key, (begin, _) in starts.items()})


def _state_dict(content: Any) -> dict[str, StoredTensor]:
    """Return a state dict, or the only one in a dict of training state. Raises ContentError if there is none."""
    if _is_state_dict(content):
        return content
    entries = content.items() if isinstance(content, dict) else ()
    inside = {key: value for key, value in entries if value and _is_state_dict(value)}
    if len(inside) == 1:
        return next(iter(inside.values()))
    several = f"; the file has several of them, {', '.join(map(repr, inside))}" if inside else ""
    raise ContentError(f"expected a dict of tensors by name (a state dict){several}; save only that")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, StoredTensor) for name, tensor in content.items()
    )


Starts = dict[str, tuple[int, int]]
"""Key of a storage -> (begin, end) in bytes."""


def _open_zip(path: Path) -> tuple[Any, Starts]:
    """Return (content of the pickle, positions of the storages) of an archive."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise ArchiveError("no data.pkl, which torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ContentError(f"data.pkl has {entries[pickles[0]].file_size} bytes, too many for a state dict")
        if root + "constants.pkl" in entries:
            raise ContentError("a TorchScript program; save its state_dict() instead")
        order = root + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ContentError("its numbers are big-endian; save it again on a little-endian machine")
        with archive.open(pickles[0]) as file:
            pickled = file.read(MAX_PICKLE_BYTES)
        content = tensor_pickle.read_bytes(pickled)
        starts = {
            name.removeprefix(root + "data/"): _position(raw, entry)
            for name, entry in entries.items()
            if name.startswith(root + "data/")
        }
    return content, starts


def _position(raw: Any, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return (begin, end) of an entry's content in the file; raises ArchiveError if it is compressed."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ContentError(f"{entry.filename[:200]} is compressed or encrypted; save it again with torch.save")
    raw.seek(entry.header_offset)
    header = raw.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ArchiveError(f"{entry.filename[:200]} has no header")
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    return begin, begin + entry.file_size


def _open_legacy(path: Path) -> tuple[Any, Starts]:
    """Return (content of the pickle, positions of the storages) of a file of PyTorch before 1.6."""
    with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if tensor_pickle.read(file) != MAGIC_NUMBER:
            raise ArchiveError("not a file of torch.save")
        tensor_pickle.read(file)  # the version of the format
        system = tensor_pickle.read(file)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ContentError("its numbers are big-endian; save it again on a little-endian machine")
        content, keys, starts = tensor_pickle.read(file), tensor_pickle.read(file), Starts()
        sizes = {
            tensor.storage.key: np.dtype(tensor.storage.dtype).itemsize
            for tensor in (content.values() if isinstance(content, dict) else ())
            if isinstance(tensor, StoredTensor)
        }
        for key in keys if isinstance(keys, list) else ():
            if not isinstance(key, str) or key not in sizes:
                raise ArchiveError("a storage that no tensor refers to")
            count = int.from_bytes(file.read(8), "little", signed=True)
            begin = file.tell()
            if not 0 <= count * sizes[key] <= len(file) - begin:
                raise ArchiveError("its numbers are incomplete")
            starts[key] = (begin, begin + count * sizes[key])
            file.seek(starts[key][1])
    return content, starts


def write_archive(path: Path, infos: Mapping[str, TensorInfo], blocks: Callable[[str], Iterable[np.ndarray]]) -> None:
    """Write tensors, block by block, as torch.save would; raises OSError.

    blocks: tensor name -> its rows in order, in the dtype of `infos`.
    """
    storages = {
        name: Storage(str(number), info.dtype, int(np.prod(info.shape, dtype=np.int64)))
        for number, (name, info) in enumerate(infos.items())
    }
    tensors = {name: tensor_pickle.contiguous(storages[name], info.shape) for name, info in infos.items()}
    total = sum(storage.size * np.dtype(storage.dtype).itemsize for storage in storages.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, progress_bar(total, f"writing {path.name}", "B") as bar:
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
            for entry, text in (
                ("data.pkl", tensor_pickle.write(tensors)),
                ("byteorder", b"little"),
                ("version", b"3\n"),
            ):
                _write_entry(archive, raw, entry, [text], len(text))
            for name, storage in storages.items():
                size = storage.size * np.dtype(storage.dtype).itemsize
                content = _contents(blocks(name), bar.update)
                _write_entry(archive, raw, f"data/{storage.key}", content, size)
        raw.flush()
        os.fsync(raw.fileno())


def _contents(blocks: Iterable[np.ndarray], written: Callable[[int], Any]) -> Iterator[memoryview]:
    for block in blocks:
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        written(block.nbytes)


def _write_entry(
    archive: zipfile.ZipFile, raw: Any, name: str, content: Iterable[bytes | memoryview], size: int
) -> None:
    """Write an uncompressed entry whose content begins at a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    large = size >= zipfile.ZIP64_LIMIT
    header = raw.tell() + 30 + len(entry.filename) + 20 * large
    padding = -(header + 4) % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as target:
        for chunk in content:
            target.write(chunk)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != step:
            return False
        step *= count
    return True

"""Files of torch.save, read and written without torch: the zip archives of PyTorch 1.6 and later, and what came before.

An archive holds the pickle of a state dict and, uncompressed, the numbers of each storage in an entry of its own, so
that any rows of a tensor can be read from where they lie.
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
"""What the first pickle of a file of PyTorch before 1.6 holds."""
MAX_PICKLE_BYTES = 256 << 20
ALIGNMENT = 64
"""Bytes; where the numbers of a storage begin, as torch.save has it."""


class ArchiveError(ValueError):
    """A file that is damaged."""


class ContentError(ArchiveError):
    """A file that holds something other than what is read here; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """An open file: its tensors by name, and where each storage begins in it."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    starts: Mapping[str, int]
    """Key of a storage -> position in bytes."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each tensor."""
        return {name: TensorInfo(tensor.shape, tensor.storage.dtype) for name, tensor in self.tensors.items()}

    def read_rows(self, name: str, rows: slice) -> np.ndarray:
        """Return rows of a tensor, reading no more of the file than these; a scalar is returned whole."""
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
        mapped = np.memmap(self.path, np.uint8, "r", at, (span * dtype.itemsize,))  # only the pages that are needed
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.ndarray(shape, dtype, mapped, 0, strides).copy()


def open_archive(path: Path) -> Archive:
    """Open a .bin or .pth file without reading its numbers.

    Raises ArchiveError for a damaged file, ContentError for one that holds anything but a dict of tensors by name,
    ForbiddenError for one that names anything but tensors and containers, OSError.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        size = file.seek(0, os.SEEK_END)
    try:
        found, starts = _open_zip(path) if zipped else _open_legacy(path)
    except (ArchiveError, OSError, tensor_pickle.ForbiddenError):
        raise
    except PickleError as error:
        raise ArchiveError(str(error)) from None
    except Exception as error:  # zipfile raises any type for bytes that are no archive
        raise ArchiveError(f"not an archive: {error or type(error).__name__}") from None
    found = _state_dict(found)
    for name, tensor in found.items():
        stored = tensor.storage
        length = stored.size * np.dtype(stored.dtype).itemsize
        begin, end = starts.get(stored.key, (0, -1))
        if begin + length > min(end, size):
            raise ArchiveError(f"the numbers of {name[:200]} are not all there")
    return Archive(path, found, {key: begin for key, (begin, _) in starts.items()})


def _state_dict(found: Any) -> dict[str, StoredTensor]:
    """Return a state dict, or the only one in a dict of a training's state; raises ContentError if there is none."""
    if _is_state_dict(found):
        return found
    entries = found.items() if isinstance(found, dict) else ()
    inside = {key: value for key, value in entries if value and _is_state_dict(value)}
    if len(inside) == 1:
        return next(iter(inside.values()))
    several = f"; it has several of them, {', '.join(map(repr, inside))}" if inside else ""
    raise ContentError(f"expected a dict of tensors by name, as a state dict is{several}; save that alone")


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, StoredTensor) for name, tensor in found.items()
    )


Starts = dict[str, tuple[int, int]]
"""Key of a storage -> (begin, end) in bytes."""


def _open_zip(path: Path) -> tuple[Any, Starts]:
    """Return (what the pickle holds, where storages lie) of an archive."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise ArchiveError("no data.pkl, which torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ContentError(f"data.pkl has {entries[pickles[0]].file_size} bytes; that of a state dict is small")
        if root + "constants.pkl" in entries:
            raise ContentError("a TorchScript program; save its state_dict() instead")
        order = root + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ContentError("its numbers are big-endian; save it again on a little-endian machine")
        with archive.open(pickles[0]) as file:
            content = file.read(MAX_PICKLE_BYTES)
        found = tensor_pickle.read_bytes(content)
        starts = {
            name.removeprefix(root + "data/"): _position(raw, entry)
            for name, entry in entries.items()
            if name.startswith(root + "data/")
        }
    return found, starts


def _position(raw: Any, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return (begin, end) of an entry's content in the file; raises ArchiveError for a compressed one."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ContentError(f"{entry.filename[:200]} is compressed or encrypted; save it again with torch.save")
    raw.seek(entry.header_offset)
    header = raw.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ArchiveError(f"{entry.filename[:200]} has no header")
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    return begin, begin + entry.file_size


def _open_legacy(path: Path) -> tuple[Any, Starts]:
    """Return (what the pickle holds, where storages lie) of a file of PyTorch before 1.6: pickles, then numbers."""
    with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if tensor_pickle.read(file) != MAGIC_NUMBER:
            raise ArchiveError("not a file of torch.save")
        tensor_pickle.read(file)  # the version of the format
        system = tensor_pickle.read(file)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ContentError("its numbers are big-endian; save it again on a little-endian machine")
        found, keys, starts = tensor_pickle.read(file), tensor_pickle.read(file), Starts()
        sizes = {
            tensor.storage.key: np.dtype(tensor.storage.dtype).itemsize
            for tensor in (found.values() if isinstance(found, dict) else ())
            if isinstance(tensor, StoredTensor)
        }
        for key in keys if isinstance(keys, list) else ():
            if not isinstance(key, str) or key not in sizes:
                raise ArchiveError("numbers that no tensor refers to")
            count = int.from_bytes(file.read(8), "little", signed=True)
            begin = file.tell()
            if not 0 <= count * sizes[key] <= len(file) - begin:
                raise ArchiveError("its numbers are not all there")
            starts[key] = (begin, begin + count * sizes[key])
            file.seek(starts[key][1])
    return found, starts


def write_archive(path: Path, infos: Mapping[str, TensorInfo], blocks: Callable[[str], Iterable[np.ndarray]]) -> None:
    """Write tensors, block by block, as torch.save would; raises OSError.

    blocks: tensor name -> its rows one after the other, in the dtype of `infos`.
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

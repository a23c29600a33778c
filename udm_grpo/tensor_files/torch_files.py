"""Read and write the tensor files of PyTorch: safetensors and .bin/.pth, whole or in shards.

None of them needs torch (torch_archive.py), and nothing in such a file is ever executed.
"""

import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from rewards_bridge.errors import UserError
from udm_grpo.machine.progress import progress_bar
from udm_grpo.tensor_files.other_weights import interrupted, other_weights
from udm_grpo.tensor_files.tensor_pickle import ForbiddenError
from udm_grpo.tensor_files.torch_archive import ArchiveError, ContentError, open_archive, write_archive
from udm_grpo.tensor_files.weight_table import TensorInfo

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt")
"""Name endings of a part's tensor files, in the order in which they are looked for."""
GIT_LFS_POINTER = b"version https://git-lfs"
_NUMPY_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_NAMES = {name: short for short, name in _NUMPY_NAMES.items()}


class WeightsError(UserError, ValueError):
    """Weights that cannot be read or do not fit; the message names every problem and what to do."""


Reader = Callable[[str, slice], np.ndarray]
"""(tensor name, which rows) -> those rows."""


@dataclass(frozen=True)
class Layout:
    """How tensors are divided into files: enough to write them again in the same way."""

    files: Mapping[str, tuple[str, ...]]
    """File name -> names of its tensors, in order."""
    dtypes: Mapping[str, str]
    """Tensor name -> NumPy name of its dtype in the file."""
    metadata: Mapping[str, Mapping[str, str]]
    """File name -> the metadata in its header (safetensors)."""
    index: str | None = None
    """Name of the index, if there are shards."""
    index_metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TensorFiles:
    """An open set of tensors, which are read one by one."""

    layout: Layout
    infos: Mapping[str, TensorInfo]
    readers: Mapping[str, Reader]
    """Tensor name -> function that reads rows of it."""

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it has in the file."""
        return self.readers[name](name, slice(None))

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows of a tensor; no more than these are read into memory."""
        return self.readers[name](name, slice(start, stop))

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Return the same tensors under other names: name in the file -> new name."""
        readers: dict[str, Reader] = {}
        for name, read in self.readers.items():
            readers[names[name]] = lambda _, rows, name=name, read=read: read(name, rows)
        files = {file: tuple(names[name] for name in members) for file, members in self.layout.files.items()}
        dtypes = {names[name]: dtype for name, dtype in self.layout.dtypes.items()}
        infos = {names[name]: info for name, info in self.infos.items()}
        return TensorFiles(replace(self.layout, files=files, dtypes=dtypes), infos, readers)


def candidates(folder: Path) -> list[Path]:
    """Return every file (or index of shards) of a folder that may hold a part's tensors, the usual one first."""
    files = [folder / (stem + ending) for stem in STEMS for ending in ENDINGS]
    return [file for file in files if file.is_file()]


def find(folder: Path) -> Path:
    """Return the file (or the index of shards) that holds a part's tensors; raises WeightsError if there is none."""
    for file in candidates(folder):
        return file
    expected = f"{STEMS[0]} with one of the endings {', '.join(ENDINGS)}"
    advice = other_weights(folder, STEMS) or "Download the folder again, with all its files."
    raise WeightsError(f"{folder}: no weights; expected {expected}. {advice}")


def open_tensors(path: Path) -> TensorFiles:
    """Open a tensor file or an index of shards without reading the tensors.

    Raises WeightsError for missing, truncated or damaged files and for an index that does not fit its shards.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Download the folder with all its files.")
    if not path.name.endswith(".index.json"):
        return _open_all(path.parent, [path.name], None, None)
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path}: no weight_map of tensor names to file names. Download it again.")
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if Path(name).name != name or not (path.parent / name).is_file()]
    if absent:
        advice = interrupted(path.parent) or "Download them too."
        raise WeightsError(f"{path} names {len(absent)} missing file(s): {', '.join(absent)}. {advice}")
    opened = _open_all(path.parent, shards, path.name, index.get("metadata"))
    there = {name: file for file, names in opened.layout.files.items() for name in names}
    lost = [f"{name} in {file}" for name, file in weight_map.items() if there.get(name) != file]
    lost += [f"{name} in {file} (not in the index)" for name, file in there.items() if name not in weight_map]
    if lost:
        raise WeightsError(
            f"{path} does not fit its shards: {'; '.join(lost)}. Download the index and the shards together."
        )
    return opened


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises WeightsError, naming the file, if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}). Download the folder with all its files."
        ) from None
    except ValueError as error:
        raise WeightsError(f"{path}: is not JSON ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a JSON object. Download it again.")
    return content


def write_tensors(
    folder: Path, layout: Layout, infos: Mapping[str, TensorInfo], blocks: Callable[[str], Iterable[np.ndarray]]
) -> None:
    """Write tensors block by block as `layout` says; raises OSError if a file cannot be written.

    blocks: tensor name -> its rows in order, in the dtype of `infos`.
    """
    for file, names in layout.files.items():
        members = {name: infos[name] for name in names}
        if file.endswith(".safetensors"):
            _write_safetensors(folder / file, layout.metadata.get(file, {}), members, blocks)
        else:
            write_archive(folder / file, members, blocks)
    if layout.index:
        weight_map = {name: file for file, names in layout.files.items() for name in names}
        index = {"metadata": layout.index_metadata or {}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(folder / layout.index, [json.dumps(index, indent=2).encode() + b"\n"])


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file and flush it to the disk; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _open_all(folder: Path, files: list[str], index: str | None, index_metadata: Any) -> TensorFiles:
    names: dict[str, tuple[str, ...]] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    infos: dict[str, TensorInfo] = {}
    readers: dict[str, Reader] = {}
    for file in files:
        opening = _open_safetensors if file.endswith(".safetensors") else _open_torch
        members, metadata[file], read = opening(folder / file)
        names[file] = tuple(members)
        infos |= members
        readers |= dict.fromkeys(members, read)
    dtypes = {name: info.dtype for name, info in infos.items()}
    return TensorFiles(Layout(names, dtypes, metadata, index, index_metadata), infos, readers)


Opened = tuple[dict[str, TensorInfo], dict[str, str], Reader]


def _open_safetensors(path: Path) -> Opened:
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from None
    infos: dict[str, TensorInfo] = {}
    for name in file.offset_keys():
        part = file.get_slice(name)
        dtype = _NUMPY_NAMES.get(part.get_dtype(), part.get_dtype())
        infos[name] = TensorInfo(tuple(part.get_shape()), dtype)
    with path.open("rb") as start:  # its header has been checked above
        length = struct.unpack("<Q", start.read(8))[0]
        header = json.loads(start.read(length))

    def read(name: str, rows: slice) -> np.ndarray:
        # Not through the library, which maps the whole file into memory.
        shape, dtype = infos[name].shape, np.dtype(infos[name].dtype)
        begin, end, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        width = int(np.prod(shape[1:]))
        at = 8 + length + header[name]["data_offsets"][0] + begin * width * dtype.itemsize
        values = np.fromfile(path, np.uint8, (end - begin) * width * dtype.itemsize, offset=at).view(dtype)
        return values.reshape(end - begin, *shape[1:]) if shape else values.reshape(())

    return infos, dict(file.metadata() or {}), read


def _open_torch(path: Path) -> Opened:
    try:
        archive = open_archive(path)
    except ForbiddenError as error:
        reason = f"it holds more than tensors ({error}), and loading that could run code"
        raise WeightsError(f"{path}: {reason}. Save the plain state dict, best as .safetensors.") from None
    except ContentError as error:
        raise WeightsError(f"{path}: {error}.") from None
    except (ArchiveError, OSError) as error:
        raise _damaged(path, error) from None
    return archive.infos, {}, archive.read_rows


def _write_safetensors(
    path: Path,
    metadata: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in infos.items():
        start, end = end, end + int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
        short = _SAFETENSORS_NAMES[info.dtype]
        header[name] = {"dtype": short, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def data() -> Iterator[memoryview]:
        with progress_bar(end, f"writing {path.name}", "B") as bar:
            for block in itertools.chain.from_iterable(map(blocks, infos)):
                yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                bar.update(block.nbytes)

    write_file(path, itertools.chain([struct.pack("<Q", len(text)) + text], data()))


def _damaged(path: Path, error: Exception) -> WeightsError:
    with path.open("rb") as file:
        start = file.read(len(GIT_LFS_POINTER))
    if start == GIT_LFS_POINTER:
        return WeightsError(f"{path}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in that folder.")
    size = path.stat().st_size
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    advice = interrupted(path.parent) or "Download it again."
    return WeightsError(f"{path}: truncated or damaged, {size} bytes ({reason}). {advice}")

"""Files of torch.save are read and written without torch as by torch itself; hostile files run nothing."""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udm_grpo.tensor_files import tensor_pickle, torch_archive
from udm_grpo.tensor_files.tensor_pickle import ForbiddenError, PickleError
from udm_grpo.tensor_files.torch_archive import ArchiveError, ContentError, open_archive, write_archive
from udm_grpo.tensor_files.torch_files import WeightsError, open_tensors
from udm_grpo.tensor_files.weight_table import TensorInfo

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
State = dict[str, torch.Tensor]


def state() -> State:
    """Return tensors of every dtype, and of every layout in their storage."""
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.randn(5, 3, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    whole = torch.randn(6, 8, 4, generator=generator)
    shared = torch.randn(40, generator=generator).bfloat16()
    return tensors | {
        "transposed": whole.transpose(0, 2),
        "every other": whole[::2, 1::3],
        "in the middle": whole[2:5],
        "a column": whole[:, 3, 1],
        "expanded": torch.randn(1, 4, generator=generator).expand(7, 4),
        "shared 1": shared[:20].view(4, 5),
        "shared 2": shared[10:],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3, 2, generator=generator)),
    }


def bits(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.detach().contiguous()
    return plain.flatten().view(torch.uint8).numpy() if plain.numel() else np.zeros(0, np.uint8)


def assert_same(path: Path, expected: State) -> None:
    """Assert that all tensors, whole and row by row, have the same bits as in torch."""
    opened = open_tensors(path)
    assert opened.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert opened.infos[name] == TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        whole = opened.read(name)
        assert (whole.dtype.name, whole.shape) == (opened.infos[name].dtype, tuple(tensor.shape)), name
        np.testing.assert_array_equal(np.ascontiguousarray(whole).reshape(-1).view(np.uint8), bits(tensor), name)
        if tensor.ndim:
            rows = [opened.read_rows(name, at, at + 2) for at in range(0, len(tensor), 2)]
            joined = np.concatenate(rows) if rows else whole
            np.testing.assert_array_equal(joined.reshape(-1).view(np.uint8), bits(tensor), name)


class Module(torch.nn.Module):
    """A module whose state dict is an OrderedDict with metadata and whose weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_every_bit_is_as_torch_has_it(options: dict[str, Any], tmp_path: Path):
    for name, expected in (("state.bin", state()), ("module.bin", Module().state_dict())):
        torch.save(expected, tmp_path / name, **options)
        assert_same(tmp_path / name, expected)


def test_rows_are_read_without_the_rest(tmp_path: Path):
    """Rows of a 64 MB file are read from their own positions."""
    torch.save({"large": torch.arange(1 << 24, dtype=torch.float32).view(1 << 14, -1)}, tmp_path / "large.bin")
    archive = open_archive(tmp_path / "large.bin")
    start = archive.starts["0"]
    with (tmp_path / "large.bin").open("r+b") as file:
        file.seek(start)
        file.write(bytes(4096))
    np.testing.assert_array_equal(archive.read_rows("large", slice(0, 2))[:, :3], [[0, 0, 0], [1024, 1025, 1026]])
    np.testing.assert_array_equal(archive.read_rows("large", slice(-1, None))[0, -2:], [(1 << 24) - 2, (1 << 24) - 1])


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_is_written(mapped: bool, tmp_path: Path):
    expected = {name: tensor for name, tensor in state().items() if tensor.is_contiguous()}
    arrays = {name: tensor.detach().clone() for name, tensor in expected.items()}
    infos = {name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in arrays.items()}

    def blocks(name: str) -> list[np.ndarray]:
        array = bits(arrays[name]).view(infos[name].dtype).reshape(infos[name].shape)
        return [array[:1], array[1:]] if array.ndim else [array]

    file = tmp_path / "folder" / "written.bin"
    write_archive(file, infos, blocks)
    loaded = torch.load(file, weights_only=True, mmap=mapped)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert_same(file, expected)
    assert all(start % torch_archive.ALIGNMENT == 0 for start in open_archive(file).starts.values())
    content = file.read_bytes()
    write_archive(file, infos, blocks)
    assert file.read_bytes() == content
    assert zipfile.ZipFile(file).testzip() is None


def test_sizes_beyond_32_bits_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # as if every entry were larger than 2 GiB
    ones = np.ones((40, 3), np.float32)
    write_archive(tmp_path / "large.bin", {"one": TensorInfo((40, 3), "float32")}, lambda _: [ones])
    monkeypatch.undo()
    assert open_archive(tmp_path / "large.bin").starts["0"] % torch_archive.ALIGNMENT == 0
    assert torch.equal(torch.load(tmp_path / "large.bin", weights_only=True)["one"], torch.ones(40, 3))
    assert_same(tmp_path / "large.bin", {"one": torch.ones(40, 3)})
    size = (1 << 33) + 5
    tensor = tensor_pickle.contiguous(tensor_pickle.Storage("0", "float32", size), (size,))
    assert tensor_pickle.read_bytes(tensor_pickle.write({"x": tensor})) == {"x": tensor}


class Payload:
    """An object whose unpickling would call a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def ran(name: str = "") -> None:
    """Fail the test; only a payload calls it."""
    raise AssertionError(f"code of a file has run {name}")


GLOBALS = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_device_tensor\n")
HOSTILE: dict[str, bytes] = {
    "a call": pickle.dumps({"a": Payload(ran)}, 2),
    "a call, protocol 4": pickle.dumps({"a": Payload(ran)}, 4),
    "a call, protocol 0": pickle.dumps({"a": Payload(ran)}, 0),
    "an object": pickle.dumps({"a": Path("a")}, 2),
    "a set": pickle.dumps({"a": {1, 2}}, 4),
    "bytes": pickle.dumps({"a": b"bytes"}, 4),
    **{name.decode(): b"\x80\x02}X\x01\x00\x00\x00a" + name + b"(X\x02\x00\x00\x00lstRs." for name in GLOBALS},
    "attributes": b"\x80\x02]}X\x01\x00\x00\x00a]sb.",
    "an extension": b"\x80\x02}X\x01\x00\x00\x00a\x82\x01s.",
    "an instance": b"\x80\x02}X\x01\x00\x00\x00a(ios\nsystem\ns.",
    "a name by the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
}
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x02.",
    "a mark alone": b"\x80\x02(.",
    "no mark": b"\x80\x02}u.",
    "an empty memo": b"\x80\x02h\x05.",
    "odd items": b"\x80\x02}(K\x01u.",
    "items of a number": b"\x80\x02K\x01K\x02K\x03s.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fa.",
    "a text of 8 exabytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "a long number of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "an unknown opcode": b"\x80\x02\xff.",
    "a persistent id that is a text": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "a rebuilt tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_code_is_refused(name: str, tmp_path: Path):
    with pytest.raises(ForbiddenError):
        tensor_pickle.read_bytes(HOSTILE[name])
    archive = tmp_path / "hostile.bin"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("archive/data.pkl", HOSTILE[name])
    with pytest.raises(WeightsError, match=r"holds more than tensors .*Save the plain state dict"):
        open_tensors(archive)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pickle_is_named(name: str):
    with pytest.raises(PickleError):
        tensor_pickle.read_bytes(BROKEN[name])


def test_keys_whose_hash_would_take_for_ever_are_refused():
    doubling = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200))
    with pytest.raises(PickleError, match="a tuple as the key"):
        tensor_pickle.read_bytes(b"\x80\x02})" + doubling + b"K\x01s.")


STORED = ("storage", torch.FloatStorage, "0", "cpu", 12)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (4, 4), (4, 1)),
        (1, (3, 4), (4, 1)),
        (0, (2, 2), (-1, 1)),
        (-4, (1,), (1,)),
        (0, (3, 4), (4,)),
        (0, (True, 4), (4, 1)),
        (0, ("3", 4), (4, 1)),
        (0, (2**80,), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, 12, 1),
    ],
)
def test_a_tensor_has_to_lie_in_its_storage(offset: Any, shape: Any, strides: Any):
    assert tensor_pickle.read_bytes(pickled(0, (3, 4), (4, 1)))["a"].shape == (3, 4)
    with pytest.raises(PickleError):
        tensor_pickle.read_bytes(pickled(offset, shape, strides))


def pickled(offset: Any, shape: Any, strides: Any) -> bytes:
    """Return a pickle of {"a": such a tensor} in a storage of 12 numbers."""

    class Stored:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return STORED if isinstance(value, Stored) else None

    file, hooks = io.BytesIO(), collections.OrderedDict()
    arguments = (Stored(), offset, shape, strides, False, hooks)
    Pickler(file, 2).dump({"a": Payload(torch._utils._rebuild_tensor_v2, *arguments)})
    return file.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Flip a few bytes, cut the file or leave a piece out."""
    kind, array = random.integers(4), bytearray(content)
    if kind == 0:
        return content[: random.integers(len(content))]
    if kind == 1:
        start, length = random.integers(len(content)), random.integers(1, 60)
        return content[:start] + content[start + length :]
    for _ in range(random.integers(1, 4)):
        array[random.integers(len(array))] = random.integers(256)
    return bytes(array)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_refused_or_read(legacy: bool, tmp_path: Path):
    """Random damage raises the one documented error, or none if the damaged bytes do not matter."""
    small = {name: tensor for name, tensor in state().items() if name in ("shared 1", "shared 2", "transposed")}
    content = saved(small, _use_new_zipfile_serialization=not legacy)
    random, refused, file = np.random.default_rng(0), 0, tmp_path / "damaged.bin"
    for _ in range(200):
        file.write_bytes(mutated(content, random))
        try:
            opened = open_tensors(file)
            for name in opened.infos:
                assert opened.read(name).nbytes < 1 << 20
        except WeightsError:
            refused += 1
    assert 50 < refused < 200


def test_damaged_pickles_raise_nothing_else():
    pickles = [zipfile.ZipFile(io.BytesIO(saved(state()))).read("archive/data.pkl"), *HOSTILE.values()]
    random, refused = np.random.default_rng(1), 0
    for number in range(600):
        try:
            tensor_pickle.read_bytes(mutated(pickles[0 if number % 2 else number % len(pickles)], random))
        except PickleError:
            refused += 1
    assert refused > 200


def rezipped(edit: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a good archive after `edit` has changed its entries."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(3)}))) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    edit(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return file.getvalue()


def of_another_order(**system: Any) -> bytes:
    """Return a file of PyTorch before 1.6 from a machine described by `system`."""
    parts = (torch_archive.MAGIC_NUMBER, 1001, {"little_endian": True} | system, {}, [])
    return b"".join(pickle.dumps(part, 2) for part in parts)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (saved([1, 2]), ContentError, "expected a dict of tensors"),
        (
            saved({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}),
            ContentError,
            "several of them, 'model', 'ema'",
        ),
        (saved({"a": torch.zeros(1), "epoch": 3}), ContentError, "expected a dict of tensors"),
        (saved({1: torch.zeros(1)}), ContentError, "expected a dict of tensors"),
        (rezipped(lambda entries: entries.pop("archive/data/0")), ArchiveError, "numbers of a are incomplete"),
        (rezipped(lambda e: e.update({"archive/data/0": b"12345678"})), ArchiveError, "numbers of a are incomplete"),
        (rezipped(lambda entries: entries.pop("archive/data.pkl")), ArchiveError, "no data.pkl"),
        (rezipped(lambda e: e.update({"archive/byteorder": b"big"})), ContentError, "big-endian"),
        (rezipped(lambda e: e.update({"archive/constants.pkl": b""})), ContentError, "TorchScript"),
        (rezipped(lambda entries: None, zipfile.ZIP_DEFLATED), ContentError, "compressed or encrypted; save it again"),
        (pickle.dumps({"a": 1}, 2), ArchiveError, "not a file of torch.save"),
        (b"", ArchiveError, "not an archive"),
        (struct.pack("<Q", 2) + b"{}", ArchiveError, "not a pickle"),
        (of_another_order(little_endian=False), ContentError, "big-endian"),
    ],
)
def test_what_is_no_state_dict_is_named(content: bytes, error: type[Exception], message: str, tmp_path: Path):
    file = tmp_path / "file.bin"
    file.write_bytes(content)
    with pytest.raises(error, match=message):
        open_archive(file)
    with pytest.raises(WeightsError, match=r"file\.bin"):
        open_tensors(file)


def test_a_file_of_old_torch_may_hold_nothing(tmp_path: Path):
    (tmp_path / "old.bin").write_bytes(of_another_order())
    assert open_tensors(tmp_path / "old.bin").infos == {}

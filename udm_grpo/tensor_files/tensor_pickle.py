"""The pickles inside PyTorch's tensor files, read opcode by opcode and written by hand; nothing is ever executed.

`read` is not an unpickler: it imports no module and calls no function. It knows the opcodes that build plain
containers, and a fixed list of names (a tensor, a parameter, an OrderedDict, the storage types) that it interprets
itself. Anything else is refused. No library but torch, which the trainer does not need, reads these files safely.
"""

import io
import mmap
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""PyTorch's storage type -> NumPy name of its dtype."""
FUNCTIONS = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "torch.Size",
)
MAX_DIMENSIONS = 64
CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
)


class PickleError(ValueError):
    """A pickle that is damaged, or that holds more than tensors and containers."""


class ForbiddenError(PickleError):
    """A pickle that names something other than tensors and containers, which an unpickler would have run."""


@dataclass(frozen=True)
class Storage:
    """A block of numbers in the file. key: its name there; size: how many numbers."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage. offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A global of the pickle: only its name, never the object."""

    text: str


class _Mark:
    """Marks where the items of a container begin on the stack."""


def read(file: IO[bytes] | mmap.mmap) -> Any:
    """Return the content of the pickle at the file's position, which is moved past it.

    Tensors are returned as StoredTensor. Raises PickleError for anything but tensors and plain containers.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            if opcode.name == "STOP":
                return machine.pop()
            machine.run(opcode.name, argument)
    except PickleError:
        raise
    except Exception as error:  # genops raises arbitrary types for bytes that are not a pickle
        raise PickleError(f"not a pickle: {error or type(error).__name__}") from None
    raise PickleError("not a pickle: it has no end")


def read_bytes(content: bytes) -> Any:
    """Return the content of a pickle in memory; raises as `read` does."""
    return read(io.BytesIO(content))


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Apply one opcode. Raises PickleError for one that plain containers and tensors do not need."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise PickleError(f"memo {argument} is empty")
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            step = getattr(self, f"on_{name.lower()}", None)
            if step is None:
                raise ForbiddenError(f"the opcode {name}")
            step(argument)

    def top(self) -> Any:
        """Return the top of the stack without removing it."""
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise PickleError("the stack is empty")
        return self.stack[-1]

    def pop(self) -> Any:
        """Remove and return the top of the stack."""
        value = self.top()
        self.stack.pop()
        return value

    def pop_many(self) -> list[Any]:
        """Remove the last mark and everything above it, and return the latter."""
        for at in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[at], _Mark):
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise PickleError("a mark is missing")

    def on_mark(self, _: Any) -> None:
        self.stack.append(_Mark())

    def on_pop(self, _: Any) -> None:
        self.pop()

    def on_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def on_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def on_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_many()))

    def on_tuple1(self, _: Any) -> None:
        self._tuple(1)

    def on_tuple2(self, _: Any) -> None:
        self._tuple(2)

    def on_tuple3(self, _: Any) -> None:
        self._tuple(3)

    def on_append(self, _: Any) -> None:
        self._extend([self.pop()])

    def on_appends(self, _: Any) -> None:
        self._extend(self.pop_many())

    def on_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def on_setitems(self, _: Any) -> None:
        self._update(self.pop_many())

    def on_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def on_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._name(module, name)

    def on_binpersid(self, _: Any) -> None:
        self.stack.append(_storage(self.pop()))

    def on_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(_call(function, arguments))

    def on_build(self, _: Any) -> None:
        """Drop the attributes of an OrderedDict, as a state dict has (_metadata)."""
        attributes = self.pop()
        if not isinstance(self.top(), dict) or not isinstance(attributes, dict):
            raise ForbiddenError("attributes of something other than an OrderedDict")

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.top(), list):
            raise PickleError("items of something other than a list")
        self.top().extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):  # no type whose hash could take long
                raise PickleError(f"a {type(key).__name__} as the key of a dict")
            target[key] = value

    def _name(self, module: Any, name: Any) -> None:
        text = f"{module}.{name}"[:200]
        known = text in FUNCTIONS or (module == "torch" and name in STORAGES)
        if not known:
            raise ForbiddenError(text)
        self.stack.append(_Name(text))


def _storage(persistent_id: Any) -> Storage:
    """Return the storage that a persistent id names: ("storage", type, key, device, size) and perhaps a view."""
    problem = "a persistent id that is not a storage"
    if not isinstance(persistent_id, tuple) or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise PickleError(problem)
    _, kind, key, _, size = persistent_id[:5]
    if len(persistent_id) == 6 and persistent_id[5] is not None:
        raise PickleError("a storage that is a view of another one, as PyTorch before 0.4 wrote")
    if not isinstance(kind, _Name) or not isinstance(key, str) or not _is_size(size):
        raise PickleError(problem)
    dtype = STORAGES.get(kind.text.removeprefix("torch."))
    if dtype is None:
        raise PickleError(problem)
    return Storage(key, dtype, size)


def _call(function: Any, arguments: Any) -> Any:
    """Return the value of a REDUCE opcode without calling its function; raises PickleError."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise PickleError("a call of something other than a known name")
    if function.text == "collections.OrderedDict" and not arguments:
        return {}
    if function.text == "torch.Size" and len(arguments) == 1:
        return _sizes(arguments[0])
    if function.text == "torch._utils._rebuild_parameter" and len(arguments) == 3:
        if isinstance(arguments[0], StoredTensor):
            return arguments[0]
    elif function.text == "torch._utils._rebuild_tensor_v2" and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    raise PickleError(f"{function.text} with arguments that it does not take")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """Return a tensor whose numbers all lie in its storage; raises PickleError."""
    shape, strides = _sizes(shape), _sizes(strides)
    if not isinstance(storage, Storage) or not _is_size(offset) or len(shape) != len(strides):
        raise PickleError("an invalid description of a tensor")
    end = offset + 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if 0 not in shape and end > storage.size:
        raise PickleError(f"a tensor of shape {list(shape)} that reaches beyond its {storage.size} stored numbers")
    return StoredTensor(storage, offset, shape, strides)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS or not all(map(_is_size, values)):
        raise PickleError("a shape that does not consist of whole numbers")
    return tuple(values)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def write(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the pickle of a state dict as torch.save writes it (protocol 2)."""
    parts = [b"\x80\x02}("]
    names = {dtype: name for name, dtype in STORAGES.items()}
    for name, tensor in tensors.items():
        kind = names[tensor.storage.dtype]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            f"ctorch\n{kind}\n".encode(),
            *(_text(tensor.storage.key), _text("cpu"), _whole(tensor.storage.size)),
            b"tQ",
            _whole(tensor.offset),
            _wholes(tensor.shape),
            _wholes(tensor.strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _whole(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little")


def _wholes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"


def contiguous(storage: Storage, shape: tuple[int, ...]) -> StoredTensor:
    """Return the tensor that fills a storage row by row."""
    strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    return StoredTensor(storage, 0, shape, strides)

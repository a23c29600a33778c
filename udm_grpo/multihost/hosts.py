"""Multi-process helpers: place, slice and gather sharded arrays, and exchange JSON values.

With one process they reduce to NumPy and `jax.device_put`. All processes must call them alike, in the same order.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array


def is_primary() -> bool:
    """Return whether this process writes the files of a run."""
    return jax.process_index() == 0


def put(value: Any, sharding: Sharding) -> Array:
    """Return a value that every process has whole as a sharded array; each process places only its own part."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_rows(make: Callable[[Sequence[int]], np.ndarray], count: int, sharding: Sharding) -> Array:
    """Return an array of `count` rows; each process creates its own: make(row numbers) -> their rows, in order."""
    indices = sharding.addressable_devices_indices_map((count,)).values()
    rows = make(sorted({int(row) for index in indices for row in _at(index, count)}))
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    return jax.make_array_from_process_local_data(sharding, rows, (count, *rows.shape[1:]))


def owned_rows(sharding: Sharding, count: int) -> np.ndarray:
    """Return which of `count` rows this process owns, ascending: the first process that holds a row owns it."""
    owner = np.full(count, jax.process_count())
    devices: Mapping[Any, Any] = sharding.devices_indices_map((count,))
    for device, index in devices.items():
        rows = _at(index, count)
        owner[rows] = np.minimum(owner[rows], device.process_index)
    return np.flatnonzero(owner == jax.process_index())


def take(array: Array, rows: np.ndarray) -> np.ndarray:
    """Return rows of an array that this process holds, as NumPy."""
    if array.is_fully_addressable:
        return np.asarray(array) if len(rows) == len(array) else np.asarray(array)[rows]
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        inside = _at(shard.index, array.shape[0])
        here = np.isin(rows, inside)
        taken[here] = np.asarray(shard.data)[rows[here] - inside[0]]
    return taken


def whole(array: Array) -> np.ndarray:
    """Return all of an array, as NumPy, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather(value: Any) -> list[Any]:
    """Return the JSON values of all processes, by process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text))))
    size = 1 << int(lengths.max()).bit_length()  # few sizes, since each is compiled
    rows = np.asarray(multihost_utils.process_allgather(np.pad(text, (0, size - len(text)))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def gather_rows(columns: Mapping[str, np.ndarray], rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return float32 columns of `count` rows, of which every process passes those numbered `rows`.

    The names are those of all processes; a process without rows passes no columns.
    """
    if jax.process_count() == 1:
        return {name: np.asarray(column) for name, column in columns.items()}
    mine = {"rows": rows.tolist(), "columns": {name: column.tolist() for name, column in columns.items()}}
    gathered: dict[str, np.ndarray] = {}
    for part in gather(mine):
        for name, column in part["columns"].items():
            gathered.setdefault(name, np.full(count, np.nan, np.float32))[part["rows"]] = column
    return gathered


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; all get the same answer."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def from_primary(make: Callable[[], Any]) -> Any:
    """Return the JSON value that process 0 makes, in every process; the others wait for it."""
    return gather(make() if is_primary() else None)[0]


def block(array: Array, layer: int | None, start: int, stop: int, axis: int) -> np.ndarray:
    """Return array[layer] (or all of it, if layer is None) from `start` to `stop` along `axis`, in every process.

    Only this part is copied to the host.
    """
    part = array if layer is None else jax.lax.dynamic_index_in_dim(array, jnp.int32(layer), 0, keepdims=False)
    if (start, stop) != (0, part.shape[axis]):
        part = jax.lax.dynamic_slice_in_dim(part, jnp.int32(start), stop - start, axis)
    return whole(part)


def _at(index: Any, count: int) -> np.ndarray:
    return np.arange(count)[index[0]]

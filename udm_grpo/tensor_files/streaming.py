"""Move tensors between files and devices, one block of rows at a time.

To read, a process needs memory for its own shards and for one block; to write, for one block. Blocks are rows of the
tensor as it is stored in the file.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from udm_grpo.batches import Params
from udm_grpo.files.finite import named
from udm_grpo.machine.progress import progress_bar
from udm_grpo.tensor_files.torch_files import WeightsError
from udm_grpo.tensor_files.weight_table import KEEP, Source, backward, forward, leaves_by_path

BLOCK_BYTES = 32 << 20
ALIGNED = 64  # bytes; a CPU device takes over a buffer with this alignment instead of copying it

Spans = tuple[tuple[int, int], ...]
"""(start, stop) along each axis."""
Rows = Callable[[str, int, int], np.ndarray]
"""(tensor name, start, stop) -> those rows of the tensor."""
Fetch = Callable[[Any, int | None, int, int, int], np.ndarray]
"""(leaf, layer or None, start, stop, axis) -> leaf[layer] from start to stop along the axis, in every process."""


def read_tree(
    place: Any, sources: Mapping[str, Source], tree: Params, read_rows: Rows, dtype: jnp.dtype, shardings: Any = None
) -> Params:
    """Return the parameters in the form of the abstract `tree`, on `shardings` (also a tree) or on the first device.

    Each process reads and keeps only what its devices hold. Raises WeightsError if tensors hold NaN, infinities or
    numbers too large for `dtype`; the message names them and `place`, where the tensors are stored.
    """
    bad = list[str]()
    names = dict[str, list[str]]()
    for name, source in sources.items():
        names.setdefault(source.path, []).append(name)
    shown = progress_bar(len(names), "reading", "tensor")
    places = dict[str, Any]() if shardings is None else leaves_by_path(shardings)

    def leaf(path: tuple[Any, ...], abstract: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        members = {member: sources[member] for member in names[name]}
        sharding = places.get(name)
        whole = tuple((0, size) for size in abstract.shape)
        held = {None: whole} if sharding is None else _held(sharding, abstract.shape)
        buffers = {spans: _aligned(tuple(stop - start for start, stop in spans), dtype) for spans in held.values()}
        bad.extend(_fill(buffers, members, read_rows))
        shown.update()
        if sharding is None:
            return jnp.asarray(buffers[whole])
        shards = [jax.device_put(buffers[spans], device) for device, spans in held.items()]
        return jax.make_array_from_single_device_arrays(abstract.shape, sharding, shards)

    with shown:
        filled = jax.tree_util.tree_map_with_path(leaf, tree)
    if bad:
        raise WeightsError(f"{place}: numbers that are NaN, infinite or too large for {dtype} in {named(bad)}")
    return filled


def row_blocks(source: Source, leaf: Any, fetch: Fetch) -> Iterator[np.ndarray]:
    """Yield a tensor as it is stored in a file, in the leaf's dtype, block by block."""
    axis = 0 if source.transform == KEEP else len(source.shape) - 1
    for start, stop in row_ranges(source.shape, leaf.dtype.itemsize):
        yield backward(fetch(leaf, source.layer, start, stop, axis), source.transform)


def fetch_here(leaf: Any, layer: int | None, start: int, stop: int, axis: int) -> np.ndarray:
    """Fetch from an array that this process holds completely, in NumPy or on its own devices."""
    part = np.asarray(leaf if layer is None else leaf[layer])
    return part[(slice(None),) * axis + (slice(start, stop),)]


def _held(sharding: Any, shape: tuple[int, ...]) -> dict[Any, Spans]:
    """Return which part of an array each device of this process holds."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        for device, index in indices.items()
    }


def _fill(buffers: Mapping[Spans, np.ndarray], members: Mapping[str, Source], read_rows: Rows) -> list[str]:
    """Read tensors into their parts of a leaf; return the names of those with values that are not finite there."""
    bad = dict[str, None]()
    for name, source in members.items():
        for start, stop in row_ranges(source.shape, 4):
            targets = [
                (target, inside)
                for spans, buffer in buffers.items()
                for target, inside in _target(spans, buffer, source, start, stop)
            ]
            if not targets:
                continue
            block = forward(read_rows(name, start, stop), source.transform)
            for target, inside in targets:
                with np.errstate(over="ignore"):  # reported below
                    target[...] = block[inside]
                if not np.isfinite(target).all():
                    bad[name] = None
    return list(bad)


def _target(
    spans: Spans, buffer: np.ndarray, source: Source, start: int, stop: int
) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
    """Yield (part of the buffer that a block of a tensor fills, index of it in the block), if they overlap."""
    if source.layer is not None:
        low, high = spans[0]
        if not low <= source.layer < high:
            return
        spans, buffer = spans[1:], buffer[source.layer - low]
    axis = 0 if source.transform == KEEP else len(spans) - 1
    first, last = max(start, spans[axis][0]), min(stop, spans[axis][1])
    if first >= last:
        return
    inside, here = [slice(*span) for span in spans], [slice(None)] * len(spans)
    inside[axis] = slice(first - start, last - start)
    here[axis] = slice(first - spans[axis][0], last - spans[axis][0])
    yield buffer[tuple(here)], tuple(inside)


def row_ranges(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each block of rows of a tensor."""
    row = int(np.prod(shape[1:])) * itemsize
    step = max(1, BLOCK_BYTES // max(row, 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _aligned(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)

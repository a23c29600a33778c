"""The device mesh and the table of how parameters are sharded on it. The only file that names mesh axes."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rewards_bridge.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"layers/attn/[qkv]/kernel$", (None, "fsdp", "tensor")),
    (r"layers/attn/o/kernel$", (None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel$", (None, "tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    # Each side of an adapter is split like that of its linear map, over tensor or fsdp; the rank is not split.
    (r"layers/(attn/[qkv]|mlp/(gate|up))/lora_a$", (None, "fsdp", None)),
    (r"layers/(attn/[qkv]|mlp/(gate|up))/lora_b$", (None, None, "tensor")),
    (r"layers/(attn/o|mlp/down)/lora_a$", (None, "tensor", None)),
    (r"layers/(attn/o|mlp/down)/lora_b$", (None, None, "fsdp")),
)
"""(pattern of a leaf's path, axis of each of its dimensions). Leaves that no pattern matches are replicated: norms, and
the image tokenizer, with which every device decodes its own images. The paths of a parameter's moments, average and
reference end in its own path, so they follow the same rules."""


class MeshError(UserError, ValueError):
    """A mesh that does not fit the devices."""


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
    """Return a mesh with the axes data, fsdp and tensor; an axis of size -1 gets the remaining devices.

    Devices are ordered by host, so that each host has consecutive rows of a batch: complete groups, if the rows per
    host are a multiple of the group size. Raises MeshError if the product of the sizes is not the number of devices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda each: (each.process_index, each.id))
    shape = [sizes[axis] for axis in AXES]
    fixed = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(devices) % fixed == 0:
        shape = [len(devices) // fixed if size == -1 else size for size in shape]
    if -1 in shape or int(np.prod(shape)) != len(devices):
        hosts = len({device.process_index for device in devices})
        where = f" of {hosts} processes" if hosts > 1 else ""
        raise MeshError(
            f"mesh {sizes} does not fit {len(devices)} device(s){where}; the product of the sizes must be that number "
            "(one of them may be -1 for the remaining devices)."
        )
    grid = np.asarray(devices, dtype=object).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return the number of devices that a batch is spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def over_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def over_second(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the second axis over data and fsdp, for a batch after a leading axis of steps."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def head(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the head's kernel [D, V] while logits are computed: over tensor only."""
    return NamedSharding(mesh, PartitionSpec(None, "tensor"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the mesh axis of each dimension by RULES; None for each if no pattern matches."""
    matching = (axes for pattern, axes in RULES if re.search(pattern, path) and len(axes) == len(shape))
    return next(matching, (None,) * len(shape))


def _place(
    axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return (the axes that each dimension is split over, the axes that split none).

    An axis that does not divide its own dimension splits another one that it divides, tried from the last: splitting
    the layers, which must then all be gathered before the first is computed, is the last resort.
    """
    placed: list[tuple[str, ...]] = [
        (axis,) if axis is not None and size % sizes[axis] == 0 else () for axis, size in zip(axes, shape, strict=True)
    ]
    left = []
    for axis in (axis for axis, own in zip(axes, placed, strict=True) if axis is not None and not own):
        parts = [sizes[axis] * math.prod(sizes[name] for name in names) for names in placed]
        dimension = next((at for at in reversed(range(len(shape))) if shape[at] % parts[at] == 0), None)
        if dimension is None:
            left.append(axis)
        else:
            placed[dimension] = (*placed[dimension], axis)
    return placed, left


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = _axes(path, shape)
    if axes == (None,) * len(shape):
        return PartitionSpec()
    placed, _ = _place(axes, shape, mesh.shape)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in placed))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return a NamedSharding for every leaf of `tree`, by RULES."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_name(path), tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


@dataclass(frozen=True)
class LayersTogether:
    """Gathers blocks that are split along their layers before a loop over the layers.

    Otherwise the compiler gathers all layers again for each of them.
    """

    mesh: Mesh

    def __call__(self, layers: Any) -> Any:
        """Return the parameters of all blocks; leaves that are not split along axis 0 are returned unchanged."""

        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            spec = _spec(f"layers/{_name(path)}", tuple(leaf.shape), self.mesh)
            if not spec or spec[0] is None:
                return leaf
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, PartitionSpec(None, *spec[1:])))

        return jax.tree_util.tree_map_with_path(one, layers)


@dataclass(frozen=True)
class AddedUp:
    """Decorates a function of (weights, a batch) that returns (gradients, metrics).

    Every device computes it on its own rows, then results are added up: they are exchanged once, whatever loops the
    function has. Every device must have the whole weights.
    """

    mesh: Mesh
    scatter: bool = True
    """Whether a device receives only its part of a sum. Otherwise it receives the whole sum and takes its part."""

    def __call__(self, function: Callable[[Any, Any], tuple[Any, Any]], learned: Any) -> Callable[[Any, Any], Any]:
        """Return the decorated function; each device gets the sum of the part of the gradients that RULES give it.

        learned: the parameters that the gradients are of.
        """
        whole, batch = PartitionSpec(), over_batch(self.mesh).spec
        parts = jax.tree.map(lambda sharding: sharding.spec, shardings(self.mesh, learned))

        def of_device(weights: Any, own: Any) -> tuple[Any, Any]:
            gradients, metrics = function(weights, own)
            return jax.tree.map(self._part, gradients, parts), jax.lax.psum(metrics, batch[0])

        return jax.shard_map(
            of_device, mesh=self.mesh, in_specs=(whole, batch), out_specs=(parts, whole), check_vma=False
        )

    def _part(self, own: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Return a device's part of the sum of all devices' arrays."""
        names = [(name,) if isinstance(name, str) else name or () for name in spec]
        split = next((at for at, axes in enumerate(names) if "fsdp" in axes), None)
        if split is None or self.mesh.shape["fsdp"] == 1:
            return jax.lax.psum(own, ("data", "fsdp"))
        if self.scatter:
            part = jax.lax.psum_scatter(own, "fsdp", scatter_dimension=split, tiled=True)
            return jax.lax.psum(part, "data") if self.mesh.shape["data"] > 1 else part
        total = jax.lax.psum(own, ("data", "fsdp"))
        size = own.shape[split] // self.mesh.shape["fsdp"]
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index("fsdp") * size, size, split)


def splits_state(mesh: Mesh) -> bool:
    """Return whether devices that share a batch split the state, so that each has a part of the weights."""
    return mesh.shape["fsdp"] > 1


def can_replicate(mesh: Mesh) -> bool:
    """Return whether every device can compute its rows of a batch by itself: no layer is split."""
    return mesh.shape["tensor"] == 1


def added_up(mesh: Mesh) -> AddedUp | None:
    """Return the decorator for several devices that each have the whole weights; None for one device."""
    return AddedUp(mesh, scatter=_can_scatter(mesh)) if mesh.size > 1 else None


def _can_scatter(mesh: Mesh) -> bool:
    """Return whether a reduce-scatter between these devices gives the right sums.

    Gloo, which connects CPU devices once jax.distributed is initialized, sometimes returns wrong numbers at the end of
    a rank's part, without an error: its ReduceScatterHalvingDoubling overwrites a buffer that is still being sent.
    """
    return mesh.devices.flat[0].platform != "cpu" or not jax.distributed.is_initialized()


def compute_shardings(mesh: Mesh, tree: Any, whole: bool) -> Any:
    """Return the sharding of every leaf of a compute copy: replicated if it is `whole`, else by RULES."""
    return jax.tree.map(lambda _: replicated(mesh), tree) if whole else shardings(mesh, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class Undivided:
    """A parameter that RULES would split over a mesh axis that divides none of its dimensions."""

    path: str
    shape: tuple[int, ...]
    axis: str
    size: int
    """Number of devices along the axis."""
    devices: int
    """Number of devices along this axis and data together, which other sizes of the axis must divide."""
    numbers: int
    """Number of the parameter's elements on every device."""
    dividing: tuple[int, ...]
    """Other sizes of the axis, up to the number of devices plus one, that would divide a dimension."""


def undivided(mesh: Mesh, tree: Any) -> list[Undivided]:
    """Return the leaves of `tree` that are not split along an axis of RULES, and the sizes that would split them."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = _name(path), tuple(leaf.shape)
        axes = _axes(name, shape)
        numbers = math.prod(NamedSharding(mesh, _spec(name, shape, mesh)).shard_shape(shape))
        for axis in _place(axes, shape, mesh.shape)[1]:
            others = range(2, mesh.size + 2)
            dividing = tuple(size for size in others if axis not in _place(axes, shape, {**mesh.shape, axis: size})[1])
            devices = mesh.shape["data"] * mesh.shape[axis]
            leaves.append(Undivided(name, shape, axis, mesh.shape[axis], devices, numbers, dividing))
    return leaves

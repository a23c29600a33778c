"""The device mesh and the one table that says how parameters lie on it. The only file that names mesh axes."""

import math
import re
from collections.abc import Mapping
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
    # Of an adapter, the side that its linear map splits over tensor or fsdp is split alike; the rank is whole.
    (r"layers/(attn/[qkv]|mlp/(gate|up))/lora_a$", (None, "fsdp", None)),
    (r"layers/(attn/[qkv]|mlp/(gate|up))/lora_b$", (None, None, "tensor")),
    (r"layers/(attn/o|mlp/down)/lora_a$", (None, "tensor", None)),
    (r"layers/(attn/o|mlp/down)/lora_b$", (None, None, "fsdp")),
)
"""(pattern of a leaf's path, axis of each of its dimensions); what no pattern matches is replicated: norms, and the
image tokenizer, of which every device decodes its own images. Moments, averages and the reference's copy of a
parameter end in its path, so they follow the same rules."""


class MeshError(UserError, ValueError):
    """A mesh that does not fit the devices."""


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
    """Return a mesh of axes data, fsdp and tensor; a size of -1 takes the rest of the devices.

    The devices go in the order of their hosts, so a host holds neighbouring rows of a batch: whole groups, wherever the
    rows of a host are a multiple of the group. Raises MeshError when the sizes do not multiply up to the number of
    devices.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda each: (each.process_index, each.id))
    wanted = [sizes[axis] for axis in AXES]
    fixed = int(np.prod([size for size in wanted if size != -1]))
    if -1 in wanted and len(devices) % fixed == 0:
        wanted = [len(devices) // fixed if size == -1 else size for size in wanted]
    if -1 in wanted or int(np.prod(wanted)) != len(devices):
        hosts = len({device.process_index for device in devices})
        where = f" of {hosts} processes" if hosts > 1 else ""
        raise MeshError(
            f"mesh {sizes} does not fit {len(devices)} device(s){where}; the sizes must multiply to that number (-1 "
            "for one of them takes the rest)."
        )
    grid = np.asarray(devices, dtype=object).reshape(wanted)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Devices that a batch is spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def over_batch(mesh: Mesh) -> NamedSharding:
    """Return the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def over_second(mesh: Mesh) -> NamedSharding:
    """Return the second axis over data and fsdp: a batch under a leading axis of steps."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def head(mesh: Mesh) -> NamedSharding:
    """Return the head's kernel [D, V] where logits are computed: split over tensor alone."""
    return NamedSharding(mesh, PartitionSpec(None, "tensor"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the axis of each dimension by RULES; none for what no pattern matches."""
    matching = (axes for pattern, axes in RULES if re.search(pattern, path) and len(axes) == len(shape))
    return next(matching, (None,) * len(shape))


def _place(
    axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return (the axes that each dimension is split over, the axes that split none).

    An axis that does not divide its own dimension takes another one that it divides, the last first: so the axis of the
    layers, for which all layers have to come together before the first is computed, is the last resort.
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
    """Brings blocks that are split along their layers together before a loop over the layers.

    Left alone, the compiler brings all layers together again for each of them.
    """

    mesh: Mesh

    def __call__(self, layers: Any) -> Any:
        """Return the parameters of all blocks; leaves that are not split along axis 0 are returned as they are."""

        def one(path: tuple[Any, ...], leaf: Any) -> Any:
            spec = _spec(f"layers/{_name(path)}", tuple(leaf.shape), self.mesh)
            if not spec or spec[0] is None:
                return leaf
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, PartitionSpec(None, *spec[1:])))

        return jax.tree_util.tree_map_with_path(one, layers)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class Undivided:
    """A parameter that RULES would split over an axis of the mesh which divides none of its dimensions."""

    path: str
    shape: tuple[int, ...]
    axis: str
    size: int
    """Devices of the mesh along the axis."""
    devices: int
    """Devices along this axis and data together: what other sizes of the axis have to divide."""
    numbers: int
    """Numbers of the parameter that every device holds."""
    dividing: tuple[int, ...]
    """Other sizes of the axis, up to one more than there are devices, that would divide it."""


def undivided(mesh: Mesh, tree: Any) -> list[Undivided]:
    """Return the leaves of `tree` that stay whole along an axis over which RULES split them, and what would divide
    them.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = _name(path), tuple(leaf.shape)
        axes = _axes(name, shape)
        numbers = math.prod(NamedSharding(mesh, _spec(name, shape, mesh)).shard_shape(shape))
        for axis in _place(axes, shape, mesh.shape)[1]:
            others = range(2, mesh.size + 2)
            dividing = tuple(size for size in others if axis not in _place(axes, shape, {**mesh.shape, axis: size})[1])
            devices = mesh.shape["data"] * mesh.shape[axis]
            found.append(Undivided(name, shape, axis, mesh.shape[axis], devices, numbers, dividing))
    return found

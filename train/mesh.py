"""Where arrays go: the device mesh, the rules that split parameters by their path, and batches onto devices.

Layers know nothing of this file. Parameters are split by name, the optimiser's moments (whose paths end in the
parameter's) by the same rule, and activations by the logical axis names that layers give to `core.axes.constrain`.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlayers.core import axes
from train.config import MeshShape

AXES = ("data", "fsdp", "sequence", "tensor")
"""Mesh axes, outermost first: `tensor` talks most and gets the neighbouring devices."""

BATCH_AXES = ("data", "fsdp")

LOGICAL_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, BATCH_AXES),
    (axes.HEADS, "tensor"),
    (axes.HIDDEN, "tensor"),
    (axes.TOKENS, "sequence"),
    (axes.WINDOWS, "sequence"),
    (axes.NODES, "sequence"),
    (axes.HEIGHT, "sequence"),
    (axes.WIDTH, None),
    (axes.DEPTH, None),
    (axes.PATTERNS, None),
    (axes.FEATURES, None),
)

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

TENSOR_RULES: Rules = (
    # A projection into heads or hidden features splits its outputs, the one back its inputs: one all-reduce a pair.
    (r"(^|/)(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(query|key|value|up)/bias$", ("tensor",)),
    (r"(^|/)(out|down)/kernel$", ("tensor", "fsdp")),
)

SMALLEST_SPLIT = 1024
"""Parameters with fewer elements that no rule names stay whole: gathering them costs more than it saves."""


def build(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of that shape over all `devices` (default: every device of every process).

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(shape, name) for name in AXES}
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    wrong = [name for name, size in sizes.items() if size != -1 and size < 1]
    if wrong or list(sizes.values()).count(-1) > 1:
        name = wrong[0] if wrong else [name for name, size in sizes.items() if size == -1][-1]
        raise ValueError(f"mesh {given} must have positive sizes, and at most one -1 (the rest); set mesh.{name}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [name for name, size in sizes.items() if size == -1]
    if rest and len(devices) % fixed == 0:
        sizes[rest[0]] = len(devices) // fixed
    elif rest or fixed != len(devices):
        needs = f"a multiple of {fixed}" if rest else str(fixed)
        virtual = f"; or start with --devices {fixed}" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"mesh {given} needs {needs} devices and there are {len(devices)}; "
            f"these sizes would fit: {'; '.join(_fitting(sizes, len(devices)))}{virtual}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _fitting(sizes: Mapping[str, int], count: int, show: int = 3) -> list[str]:
    """Return the ways to lay out `count` devices that are nearest to `sizes`."""

    def factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (n,)
            return
        for first in (d for d in range(1, n + 1) if n % d == 0):
            for others in factorisations(n // first, parts - 1):
                yield (first, *others)

    def distance(candidate: tuple[int, ...]) -> float:
        pairs = zip(candidate, sizes.values(), strict=True)
        return sum(abs(math.log(size / wanted)) for size, wanted in pairs if wanted != -1)

    nearest = sorted(factorisations(count, len(AXES)), key=distance)[:show]
    return [", ".join(f"{name}={size}" for name, size in zip(AXES, way, strict=True)) for way in nearest]


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Put `mesh` and the logical rules in scope, which every trace of a sharded function needs.

    It is `jax.set_mesh`: under the older `with mesh:` logical constraints silently do nothing. Random numbers are
    partitionable, so dropout masks are the same on any mesh.
    """
    with jax.set_mesh(mesh), jax.threefry_partitionable(True), nn.logical_axis_rules(LOGICAL_RULES):
        yield


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules = ()) -> PartitionSpec:
    """Return how the parameter at `path` ("block_0/query/kernel") is split.

    The first of `rules`, then of `TENSOR_RULES`, that matches gives the mesh axes of the trailing axes; an axis that
    does not divide stays whole. A parameter that no rule names is split over `fsdp` along its largest axis that
    divides.
    """
    entries: list[str | None] = [None] * len(shape)
    for pattern, names in (*rules, *TENSOR_RULES):
        if len(names) <= len(shape) and re.search(pattern, path):
            for axis, name in enumerate(names, len(shape) - len(names)):
                if name is not None and name not in mesh.shape:
                    raise ValueError(f"mesh rule {pattern!r} names axis {name!r}; a mesh axis is one of {AXES}")
                entries[axis] = name if name is not None and shape[axis] % mesh.shape[name] == 0 else None
            break
    else:
        if math.prod(shape) >= SMALLEST_SPLIT:
            divisible = [axis for axis, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
            if divisible:
                entries[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Return the `NamedSharding` of every leaf of a state, by its path and shape."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that does not divide over the mesh.

    Raises:
      ValueError: naming the sizes above and below that would do.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        raise ValueError(
            f"{name}={batch_size} must be divisible by data*fsdp={parts} of the mesh; "
            f"set {name} to {f'{below} or ' if below else ''}{above}"
        )


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Return (index, count): this process feeds the `index`-th of `count` equal runs of rows of every batch.

    Processes that hold the same rows (a tensor axis across hosts) get the same index.

    Raises:
      ValueError: if the rows of this process are not one run.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    runs = sorted({index[0].indices(batch_size)[:2] for index in places.values() if index is not None})
    first, last = runs[0][0], runs[-1][1]
    rows = sum(stop - start for start, stop in runs)
    if rows != last - first or batch_size % rows or first % rows:
        raise ValueError(
            f"this process holds rows {runs} of a batch of {batch_size}, which must be one run of equal length on "
            "every process; set mesh sizes so that data*fsdp divides over the processes"
        )
    return first // rows, batch_size // rows


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this process's rows as part of the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of `tree` whole, as NumPy, on every process."""
    whole = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), whole)


def describe(mesh: Mesh) -> str:
    """Return the mesh in words: `data=2, fsdp=2, sequence=1, tensor=2 on 8 cpu devices`."""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{sizes} on {mesh.size} {mesh.devices.flat[0].device_kind.lower()} device{'s' * (mesh.size > 1)}"

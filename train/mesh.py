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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlayers.core import axes
from train.config import MeshShape

AXES = ("data", "fsdp", "sequence", "tensor")
"""Mesh axes, outermost first: `tensor` talks most and gets the neighbouring devices."""

BATCH_AXES = ("data", "fsdp")

LogicalRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

LOGICAL_RULES: LogicalRules = (
    (axes.BATCH, BATCH_AXES),
    (axes.HEADS, "tensor"),
    (axes.HIDDEN, "tensor"),
    (axes.TOKENS, "sequence"),
    (axes.WINDOWS, "sequence"),
    (axes.NODES, "sequence"),
    (axes.HEIGHT, "sequence"),
    (axes.WIDTH, None),
    (axes.DEPTH, None),
    (axes.PATTERNS, "sequence"),
    (axes.FEATURES, None),
)

SEQUENCE_PARALLEL_RULES: LogicalRules = (
    # Heads and hidden features come first and take the tensor axis, so these hold between the pairs of products only.
    *LOGICAL_RULES[:3],
    *((name, ("sequence", "tensor")) for name in (axes.TOKENS, axes.NODES, axes.HEIGHT)),
    *LOGICAL_RULES[3:],
)
"""What lies between the pairs of tensor-parallel products (norms, dropout, residuals) is split over `tensor` too, along
tokens: the all-reduce after a pair becomes a reduce-scatter there and an all-gather before the next (Korthikanti et
al., Reducing Activation Recomputation in Large Transformer Models, MLSys 2023, section 4.2.2).
"""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

TENSOR_RULES: Rules = (
    # A projection into heads or hidden features splits its outputs, the one back its inputs: one all-reduce a pair.
    (r"(^|/)(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(query|key|value|up)/bias$", ("tensor",)),
    (r"(^|/)(out|down)/kernel$", ("tensor", "fsdp")),
    # A column a head, like the attention that reads it: else its gradient is gathered.
    (r"(^|/)relative_position_bias_table$", (None, "tensor")),
    # A memory lies where its patterns are looked at; see jaxlayers.hopfield.streaming.
    (r"(^|/)stored_(patterns|values)$", ("sequence", None)),
)

SMALLEST_SPLIT = 1024
"""Parameters with fewer elements that no rule names stay whole: gathering them costs more than it saves."""


def build(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of that shape over all `devices` (default: every device of every process).

    On a TPU the mesh follows the torus. With `shape.slices` above 1, devices of one slice stay together: `data`, and
    `fsdp` where `data` is too short, spans the slices, so that only their collectives use the slow network.

    Raises:
      ValueError: if the product of the sizes is not the number of devices, or the slices do not fit.
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
    grid = _grid(tuple(sizes.values()), shape.slices, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(sizes: tuple[int, ...], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array of those sizes, neighbours in it being neighbours in the network.

    Of several slices `data` spans as many as it can and `fsdp` the rest; the others stay within one, whose links are
    fast.
    """
    granules = _granules(slices, devices)
    over_data = math.gcd(sizes[0], slices)
    over_fsdp = slices // over_data
    if sizes[1] % over_fsdp:
        given = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh.slices={slices} must divide data, or data and fsdp together, of mesh {given}; set mesh.data to a "
            f"multiple of {slices}, or mesh.slices to the number of slices"
        )
    inner = (sizes[0] // over_data, sizes[1] // over_fsdp, *sizes[2:])
    # A torus axis may have to be cut, else some sizes that multiply to the number of devices would be refused.
    blocks = [mesh_utils.create_device_mesh(inner, block, allow_split_physical_axes=True) for block in granules]
    rank = len(sizes)
    whole = np.stack(blocks).reshape(over_data, over_fsdp, *(1,) * (rank - 2), *inner)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    return whole.transpose(order).reshape(sizes)


def _granules(slices: int, devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices of each slice: what the hardware calls one, else processes, else runs of equal length."""
    if slices < 1:
        raise ValueError(f"mesh.slices={slices} must be positive; set mesh.slices to the number of slices")
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if slices == 1:
        if len(found) > 1 and devices[0].platform == "tpu":
            raise ValueError(f"mesh.slices=1 must be the {len(found)} slices that the devices form; set mesh.slices")
        return [list(devices)]
    if len(found) > 1 and len(found) != slices:
        raise ValueError(
            f"mesh.slices={slices} must be the {len(found)} slices that the devices form; set mesh.slices={len(found)}"
        )
    if len(found) == slices:
        granules = [found[index] for index in sorted(found)]
    else:
        processes = len({device.process_index for device in devices})
        for count, what in ((len(devices), "devices"), (processes, "processes")):
            if count > 1 and count % slices:
                raise ValueError(f"mesh.slices={slices} must divide the {count} {what}; set mesh.slices")
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        length = len(devices) // slices
        granules = [ordered[start : start + length] for start in range(0, len(devices), length)]
    if len({len(block) for block in granules}) > 1:
        raise ValueError(f"the slices have {[len(block) for block in granules]} devices, which must be equally many")
    return granules


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
def use(mesh: Mesh, *, sequence_parallel: bool = False) -> Iterator[None]:
    """Put `mesh` and the logical rules in scope, which every trace of a sharded function needs.

    It is `jax.set_mesh`: under the older `with mesh:` logical constraints silently do nothing. Random numbers are
    partitionable, so dropout masks are the same on any mesh. Whether activations are `sequence_parallel` changes no
    value and no place of a parameter, so it may differ between training and evaluation.
    """
    rules = SEQUENCE_PARALLEL_RULES if sequence_parallel else LOGICAL_RULES
    with jax.set_mesh(mesh), jax.threefry_partitionable(True), nn.logical_axis_rules(rules):
        yield


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules = ()) -> PartitionSpec:
    """Return how the parameter at `path` ("block_0/query/kernel") is split.

    The first of `rules`, then of `TENSOR_RULES`, that matches gives the mesh axes of the trailing axes; an axis that
    does not divide stays whole. Where none of `rules` matches, a parameter that is not split over `fsdp` by then is so
    along its largest axis that is left and divides.
    """
    entries: list[str | None] = [None] * len(shape)
    for index, (pattern, names) in enumerate((*rules, *TENSOR_RULES)):
        if len(names) <= len(shape) and re.search(pattern, path):
            for axis, name in enumerate(names, len(shape) - len(names)):
                if name is not None and name not in mesh.shape:
                    raise ValueError(f"mesh rule {pattern!r} names axis {name!r}; a mesh axis is one of {AXES}")
                entries[axis] = name if name is not None and shape[axis] % mesh.shape[name] == 0 else None
            own = index < len(rules)
            break
    else:
        own = False
    if not own and "fsdp" not in entries and math.prod(shape) >= SMALLEST_SPLIT:
        left = [axis for axis, name in enumerate(entries) if name is None or mesh.shape[name] == 1]
        divisible = [axis for axis in left if shape[axis] % mesh.shape["fsdp"] == 0]
        if divisible and mesh.shape["fsdp"] > 1:
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


def bytes_per_device(abstract: Any) -> int:
    """Return the bytes that one device holds of a tree of arrays, or of their shapes, that carry shardings.

    Applied to the subtrees of a state it tells what parameters, moments and averages take.
    """

    def held(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(held(leaf) for leaf in jax.tree.leaves(abstract))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Return the sharding of each array of a batch.

    Pictures and volumes `[rows, *space, channels]` with two or three spatial axes are split along their height as well,
    over `sequence` where it divides: what `LOGICAL_RULES` do to the maps made of them.
    """

    def place(rows: Any) -> NamedSharding:
        divides = rows.ndim >= 4 and rows.shape[-3] % mesh.shape["sequence"] == 0
        split = divides and mesh.shape["sequence"] > 1
        spec = PartitionSpec(BATCH_AXES, *(None,) * (rows.ndim - 4), "sequence") if split else batch_sharding(mesh).spec
        return NamedSharding(mesh, spec)

    return {name: place(rows) for name, rows in batch.items()}


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
    """Return this process's rows as part of the global batch on the devices, see `batch_shardings`."""
    arrays = {name: np.asarray(rows) for name, rows in batch.items()}
    places = batch_shardings(arrays, mesh)
    # Of a picture that is split over several processes each has all rows of pixels, of which its devices take theirs.
    processes = process_rows(mesh, math.prod(mesh.shape[axis] for axis in BATCH_AXES))[1]
    return {
        name: jax.make_array_from_process_local_data(places[name], rows, (processes * rows.shape[0], *rows.shape[1:]))
        for name, rows in arrays.items()
    }


def gather(tree: Any, mesh: Mesh) -> Any:
    """Return the arrays of `tree` whole, as NumPy, on every process."""
    whole = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), whole)


def describe(mesh: Mesh) -> str:
    """Return the mesh in words: `data=2, fsdp=2, sequence=1, tensor=2 on 8 cpu devices`."""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{sizes} on {mesh.size} {mesh.devices.flat[0].device_kind.lower()} device{'s' * (mesh.size > 1)}"

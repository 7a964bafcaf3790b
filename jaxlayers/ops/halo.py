"""Windows of a map whose spatial axes are split over a device mesh: each device cuts its own, and only a halo travels.

A device that holds h entries of an axis computes the windows that begin among them. Where its last window ends, the
next device's first begins, so it wants from the next device what lies before that: `amount` entries if h is a multiple
of the window (none without a shift), fewer than a window in any case. They come by one `ppermute`, and what the window
makes of them goes back by another; nothing else moves, neither forwards nor in the gradient. Along an unsplit axis the
device is its own neighbour.

Everything that depends on shapes alone is NumPy, as in `ops/windows.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from jaxlayers.core import axes
from jaxlayers.ops.patches import crop, from_blocks, pad_to_multiple, split_shape, to_blocks
from jaxlayers.ops.windows import merge_windows, partition_windows, regions_of_rows, shift, shift_mask, unshift

Split = tuple[tuple[str, ...], ...]
"""The mesh axes that each spatial axis of a map is split over; empty for an axis that is not."""


def map_split(shape: Sequence[int], window: Sequence[int]) -> Split:
    """Return how the logical rules in scope split the windows of a map `[*batch, *size, features]`.

    An axis is split as `core.axes.constrain_map` splits it, over as many of its mesh axes as leave each device at least
    the length of a window. Where none does, the map is small, and every device has all of it along this axis.

    Args:
      shape: shape of the map.
      window: size of the window along each spatial axis.
    """
    _, size, _ = split_shape(shape, len(window))
    return tuple(
        _leaving(names, length // step)
        for names, length, step in zip(axes.split_map(shape, len(window)), size, window, strict=True)
    )


def _leaving(names: tuple[str, ...], most: int) -> tuple[str, ...]:
    """Return the first of the mesh axes, as many as make no more than `most` parts; none if they make one."""
    while names and _parts(names) > most:
        names = names[:-1]
    return names if _parts(names) > 1 else ()


def cut_windows(
    x: Shaped[Array, "*axes features"], window: Sequence[int], amount: Sequence[int], split: Split
) -> Shaped[Array, "*windows tokens features"]:
    """Pad a map with zeros at its ends to multiples of the window, shift it, and cut it into windows.

    Args:
      x: map `[*batch, *size, features]`.
      window: size of a window along each spatial axis.
      amount: the shift along each axis, less than the window.
      split: see `map_split`.

    Returns:
      Where nothing is split `[*batch, windows, tokens, features]`, see `partition_windows`. Else
      `[*batch, *grid, tokens, features]`, the grid being split like the map. A device with fewer windows than others
      has idle ones at its end: they meet no true token, and `join_windows` leaves them out.
    """
    if not any(split):
        return partition_windows(shift(pad_to_multiple(x, window), amount), window)
    batch, size, features = split_shape(x.shape, len(window))

    def cut(x: Array) -> Array:
        for axis, (each, names) in enumerate(zip(_cuts(size, window, amount, split), split, strict=True), len(batch)):
            x = _to_rows(x, axis, each, names)
        blocks = to_blocks(x, window)
        return blocks.reshape(*blocks.shape[: len(batch) + len(window)], math.prod(window), features)

    return _on_devices(cut, x, len(batch), split)


def join_windows(
    windows: Shaped[Array, "*windows tokens features"],
    size: Sequence[int],
    window: Sequence[int],
    amount: Sequence[int],
    split: Split,
) -> Shaped[Array, "*axes features"]:
    """Return the inverse of `cut_windows` for a map of spatial size `size`; what was padded is left out."""
    if not any(split):
        padded = [-(-length // step) * step for length, step in zip(size, window, strict=True)]
        return crop(unshift(merge_windows(windows, window, padded), amount), size)
    first = windows.ndim - 2 - len(window)

    def join(y: Array) -> Array:
        y = from_blocks(y.reshape(*y.shape[:-2], *window, y.shape[-1]), len(window))
        for axis, (each, names) in enumerate(zip(_cuts(size, window, amount, split), split, strict=True), first):
            y = _to_map(y, axis, each, names)
        return y

    return _on_devices(join, windows, first, split)


def window_mask(
    size: Sequence[int], window: Sequence[int], amount: Sequence[int], split: Split, *, mask_padding: bool = False
) -> Shaped[Array, "*windows tokens tokens"] | None:
    """Return which tokens of each of `cut_windows` may attend to which, or `None` if all may: see `shift_mask`."""
    if not any(split):
        mask = shift_mask(size, window, amount, mask_padding=mask_padding)
        return None if mask is None else jnp.asarray(mask)
    rows = [each.rows() for each in _cuts(size, window, amount, split)]
    label = regions_of_rows(rows, size, amount, separate_padding=mask_padding)
    if (label == label[..., :1]).all():
        return None
    # Every device has the labels of all windows, a byte a token; what they give for pairs is made where it is used.
    labels = jnp.asarray(label, jnp.int8)
    return labels[..., :, None] == labels[..., None, :]


def window_names(split: Split) -> tuple[str, ...]:
    """Return the logical axes that the windows of `cut_windows` lie along."""
    return axes.SPACE[len(split)] if any(split) else (axes.WINDOWS,)


def _parts(names: Sequence[str]) -> int:
    """Return the number of parts that mesh axes make."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def _on_devices(fn: Callable[[Array], Array], x: Array, first: int, split: Split) -> Array:
    """Apply `fn` on each device to its part of `x`, whose axes from `first` on are split; the rest is left open."""
    space = [names or None for names in split]
    open_axes = [PartitionSpec.UNCONSTRAINED] * first
    # An axis whose windows are not split may have come split.
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(*open_axes, *space))
    spec = PartitionSpec(*[None] * first, *space)
    names = {name for each in split for name in each}
    return jax.shard_map(fn, in_specs=spec, out_specs=spec, axis_names=names)(x)


# One axis -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the windows of one axis are dealt out to its parts.

    Windows lie at `amount + n window` for n from 0 on. The last one may go round the end of the padded axis to its
    beginning: what is there comes from the first part.
    """

    length: int
    window: int
    amount: int
    parts: int

    @property
    def local(self) -> int:
        """Entries of a part."""
        return self.length // self.parts

    @property
    def gap(self) -> int:
        """Zeros at the end of the axis."""
        return -self.length % self.window

    @property
    def offsets(self) -> np.ndarray:
        """Where the first window of each part begins in it; a part wants as much from the next as this is there."""
        return (self.amount - self.local * np.arange(self.parts)) % self.window

    @property
    def halo(self) -> int:
        """Entries that travel."""
        return int(self.offsets.max())

    @property
    def even(self) -> bool:
        """Whether all parts begin alike."""
        return bool((self.offsets == self.halo).all())

    @property
    def counts(self) -> np.ndarray:
        """Windows of each part."""
        first = (self.local * np.arange(self.parts) + self.offsets - self.amount) // self.window
        return np.diff([*first, (self.length + self.gap) // self.window])

    def rows(self) -> np.ndarray:
        """Return which entry of the padded axis is at each place of each window `[windows, window]`.

        Idle windows repeat an entry that is neither padding nor from the other end.
        """
        starts = self.local * np.arange(self.parts) + self.offsets
        index = np.arange(self.counts.max())
        places = (starts[:, None] + self.window * index)[:, :, None] + np.arange(self.window)
        rows = np.where((index < self.counts[:, None])[:, :, None], places % (self.length + self.gap), self.amount)
        return rows.reshape(-1, self.window)


def _cuts(size: Sequence[int], window: Sequence[int], amount: Sequence[int], split: Split) -> list[_Cut]:
    return [
        _Cut(length, step, by, _parts(names))
        for length, step, by, names in zip(size, window, amount, split, strict=True)
    ]


def _to_rows(x: Array, axis: int, cut: _Cut, names: tuple[str, ...]) -> Array:
    """Return the entries of a part's windows, in order: some of its own and the halo."""
    length = int(cut.counts.max()) * cut.window
    behind = _neighbour(_take(x, 0, cut.halo, axis), names, -1)
    if cut.gap:
        # Between the last part and the first lies the padding.
        after = _pad(behind, cut.gap, 0, axis)
        last = jax.lax.axis_index(names) == cut.parts - 1 if names else True
        behind = jnp.where(last, after, _pad(behind, 0, cut.gap, axis))
    buffer = jnp.concatenate([x, behind], axis)
    buffer = _pad(buffer, 0, max(0, cut.halo + length - buffer.shape[axis]), axis)
    return _take(buffer, cut.halo if cut.even else _offset(cut, names), length, axis)


def _to_map(y: Array, axis: int, cut: _Cut, names: tuple[str, ...]) -> Array:
    """Return what `_to_rows` took to where it came from."""
    length = cut.local + cut.gap + cut.halo
    y = _pad(y, cut.halo, max(0, length - y.shape[axis] - int(cut.offsets.min())), axis)
    y = _take(y, 0 if cut.even else cut.halo - _offset(cut, names), length, axis)
    own, behind = _take(y, 0, cut.local, axis), _take(y, cut.local, cut.halo, axis)
    if cut.gap:
        last = jax.lax.axis_index(names) == cut.parts - 1 if names else True
        behind = jnp.where(last, _take(y, cut.local + cut.gap, cut.halo, axis), behind)
    before = _neighbour(behind, names, 1)
    if cut.even:
        return jnp.concatenate([before, _take(own, cut.halo, cut.local - cut.halo, axis)], axis)
    place = jnp.arange(cut.local).reshape([-1 if other == axis else 1 for other in range(y.ndim)])
    return jnp.where(place < _offset(cut, names), _pad(before, 0, cut.local - cut.halo, axis), own)


def _neighbour(x: Array, names: tuple[str, ...], step: int) -> Array:
    """Send `x` to the part that is `step` further, round the end; receive the like."""
    if not names or not x.size:
        return x
    # `ppermute` counts devices in the order of the mesh, whatever the order of the names.
    sizes = jax.sharding.get_abstract_mesh().shape
    ordered = [name for name in sizes if name in names]
    places = np.arange(_parts(names)).reshape([sizes[name] for name in ordered])
    places = places.transpose([ordered.index(name) for name in names]).ravel()
    pairs = list(zip(places.tolist(), np.roll(places, -step).tolist(), strict=True))
    return jax.lax.ppermute(x, tuple(ordered), pairs)


def _offset(cut: _Cut, names: tuple[str, ...]) -> Array:
    return jnp.asarray(cut.offsets, np.int32)[jax.lax.axis_index(names)]


def _take(x: Array, start: Array | int, length: int, axis: int) -> Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + length, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis)


def _pad(x: Array, before: int, after: int, axis: int) -> Array:
    if not before and not after:
        return x
    return jnp.pad(x, [(before, after) if other == axis else (0, 0) for other in range(x.ndim)])

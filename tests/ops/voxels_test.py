import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.voxels import (
    Voxels,
    downsample_voxels,
    find_voxels,
    interpolate,
    max_by_cell,
    mean_by_cell,
    nearest_voxels,
    sort_into_cells,
    take,
    voxelize,
    window_cells,
)

# Compiled once a shape, so the scenes have the same length where they can.
sort = jax.jit(sort_into_cells)
windows = jax.jit(window_cells, static_argnames=("window", "shift"))
merge = jax.jit(downsample_voxels, static_argnames=("stride", "capacity", "scale"))
search = jax.jit(nearest_voxels, static_argnames=("neighbors", "chunk"))
find = jax.jit(find_voxels)
gather = jax.jit(voxelize, static_argnames=("size", "capacity"))


def scene(rng, count=40, length=49, size=6, kinds=2, lattice=False):
    """Random voxels that all differ, then padding with any numbers."""
    grid = np.stack(np.unravel_index(rng.permutation(size**3)[:count], (size,) * 3), axis=-1) - size // 2
    coordinates = np.concatenate([grid, rng.integers(-99, 99, (length - count, 3))]).astype(np.int32)
    signals = rng.uniform(-1, 1, (length, 3 * kinds)).astype(np.float32)
    signals[:, :3] = 0.5 if lattice else rng.uniform(0, 1, (length, 3))
    mask = np.arange(length) < count
    return jnp.asarray(coordinates), jnp.asarray(signals), jnp.asarray(mask)


def sorted_scene(rng, **keywords):
    coordinates, signals, mask = scene(rng, **keywords)
    order = sort(coordinates, mask).order
    return Voxels(take(coordinates, order), take(signals, order), mask[order])


# Cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "shift"), [(1, 0), (3, 1), (100, 50)])
def test_cells_are_those_of_a_loop(rng, window, shift):
    coordinates, _, mask = scene(rng)
    cells = windows(coordinates, mask, window, shift)
    keys = [tuple((np.asarray(one) + shift) // window) for one in coordinates[mask]]
    names = sorted(set(keys))
    assert cells.count == len(names)
    assert cells.largest == max(keys.count(name) for name in names)
    np.testing.assert_array_equal(cells.index[mask], [names.index(key) for key in keys])
    np.testing.assert_array_equal(cells.index[~mask], -1)
    # Voxels of a cell stand together, in the order they had; padding stands last.
    expected = sorted(range(len(keys)), key=lambda voxel: keys[voxel])
    np.testing.assert_array_equal(cells.order[: len(keys)], expected)
    np.testing.assert_array_equal(cells.order[cells.place], np.arange(len(mask)))


def test_an_empty_list_has_no_cells(rng):
    coordinates, _, mask = scene(rng)
    cells = windows(coordinates, jnp.zeros_like(mask), 2)
    assert cells.count == 0
    assert cells.largest == 0
    assert np.all(cells.index == -1)


def test_batches_are_sorted_one_by_one(rng):
    scenes = [scene(rng, count=count) for count in (49, 20, 0)]
    coordinates, _, mask = (jnp.stack(leaves) for leaves in zip(*scenes, strict=True))
    together = windows(coordinates, mask, 3, 1)
    for index, (coordinates, _, mask) in enumerate(scenes):
        alone = windows(coordinates, mask, 3, 1)
        for field in dataclasses.fields(alone):
            np.testing.assert_array_equal(getattr(together, field.name)[index], getattr(alone, field.name))


@pytest.mark.parametrize("count", [0, 1, 33])
def test_find_gives_the_place_of_every_voxel_and_of_no_other(rng, count):
    voxels = sorted_scene(rng, count=count)
    queries = np.stack(np.meshgrid(*[np.arange(-4, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    found = find(voxels.coordinates, voxels.mask, jnp.asarray(queries))
    places = {tuple(one): place for place, one in enumerate(np.asarray(voxels.coordinates)[:count])}
    np.testing.assert_array_equal(found, [places.get(tuple(query), -1) for query in queries])


# Points ----------------------------------------------------------------------------------------------------------


def test_voxelize_averages_the_points_of_each_voxel(rng):
    points, colours = rng.uniform(-1, 1, (60, 3)), rng.uniform(-1, 1, (60, 3))
    mask = rng.uniform(size=60) < 0.8
    inputs = (jnp.asarray(one, jnp.float32) for one in (points, colours))
    voxels, index, count = gather(*inputs, 0.5, 64, jnp.asarray(mask))
    keys = [tuple(key) for key in np.floor(points / 0.5).astype(int)]
    names = sorted({key for key, held in zip(keys, mask, strict=True) if held})
    assert count == np.sum(voxels.mask) == len(names)
    np.testing.assert_array_equal(voxels.coordinates[: len(names)], names)
    np.testing.assert_array_equal(index, [names.index(k) if m else -1 for k, m in zip(keys, mask, strict=True)])
    for place, name in enumerate(names):
        members = [one for one in range(60) if mask[one] and keys[one] == name]
        expected = [*(points[members].mean(0) / 0.5 - name), *colours[members].mean(0)]
        np.testing.assert_allclose(voxels.signals[place], expected, atol=1e-5)
    assert not np.any(voxels.signals[len(names) :])


def test_voxelize_says_how_many_voxels_there_are_where_they_do_not_fit(rng):
    points = jnp.asarray(rng.uniform(0, 8, (40, 3)), jnp.float32)
    wide, every, count = gather(points, points, 1.0, 40)
    narrow, index, same = gather(points, points, 1.0, 10)
    assert 10 < count == same
    np.testing.assert_array_equal(narrow.coordinates, wide.coordinates[:10])
    np.testing.assert_array_equal(narrow.signals, wide.signals[:10])
    np.testing.assert_array_equal(index, np.where(every < 10, every, -1))


# Pooling ---------------------------------------------------------------------------------------------------------


def test_means_and_maxima_are_those_of_a_loop(rng):
    x = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    index = jnp.asarray(rng.integers(-1, 6, 20), jnp.int32).at[:2].set(5)
    index = jnp.where(index == 3, -1, index)
    for found, how in ((mean_by_cell(x, index, 7), np.mean), (max_by_cell(x, index, 7), np.max)):
        for cell in range(7):
            members = np.asarray(x)[np.asarray(index) == cell]
            np.testing.assert_allclose(found[cell], how(members, axis=0) if len(members) else 0.0, atol=1e-6)


def test_gradient_of_a_maximum_goes_to_the_largest(rng):
    x = jnp.asarray([[1.0], [5.0], [2.0], [7.0], [7.0]])
    gradient = jax.grad(lambda x: jnp.sum(max_by_cell(x, jnp.asarray([0, 0, -1, 1, 1]), 3)))(x)
    np.testing.assert_array_equal(gradient[:, 0], [0, 1, 0, 0.5, 0.5])


@pytest.mark.parametrize("scale", [1, 4])
def test_merged_cells_speak_by_the_voxel_nearest_to_their_mean(rng, scale):
    voxels = sorted_scene(rng)
    merged = merge(voxels, 2, 30, scale)
    coordinates, signals = (np.asarray(one)[np.asarray(voxels.mask)] for one in (voxels.coordinates, voxels.signals))
    cells = coordinates // 2
    names = np.unique(cells, axis=0)
    assert merged.count == np.sum(merged.voxels.mask) == len(names)
    np.testing.assert_array_equal(merged.voxels.coordinates[: len(names)], names)
    known = np.concatenate([scale * (coordinates + signals[:, :3]), signals[:, 3:]], axis=-1)
    for place, name in enumerate(names):
        members = np.flatnonzero((cells == name).all(-1))
        np.testing.assert_array_equal(merged.index[members], place)
        distance = np.sum((known[members] - known[members].mean(0)) ** 2, axis=-1)
        # The two of a pair are equally near: the first is taken.
        chosen = members[0 if len(members) == 2 else np.argmin(distance)]
        np.testing.assert_array_equal(merged.points.coordinates[place], coordinates[chosen])
        np.testing.assert_array_equal(merged.points.signals[place], signals[chosen])
        within = (coordinates[chosen] + signals[chosen, :3]) / 2 - name
        np.testing.assert_allclose(merged.voxels.signals[place], [*within, *signals[chosen, 3:]], atol=1e-6)


def test_merging_says_how_many_cells_there_are_where_they_do_not_fit(rng):
    voxels = sorted_scene(rng)
    wide, narrow = (merge(voxels, 2, capacity) for capacity in (40, 10))
    assert 10 < wide.count == narrow.count
    np.testing.assert_array_equal(narrow.voxels.coordinates, wide.voxels.coordinates[:10])
    np.testing.assert_array_equal(narrow.index, np.where(wide.index < 10, wide.index, -1))


def test_merging_follows_translations_by_cells_to_the_bit(rng):
    voxels = sorted_scene(rng)
    plain = merge(voxels, 3, 40)
    by = jnp.asarray([300, -9, 3_000_000])
    moved = merge(dataclasses.replace(voxels, coordinates=voxels.coordinates + by), 3, 40)
    held = plain.voxels.mask
    np.testing.assert_array_equal(moved.voxels.mask, held)
    np.testing.assert_array_equal(moved.voxels.coordinates[held], (plain.voxels.coordinates + by // 3)[held])
    np.testing.assert_array_equal(moved.voxels.signals, plain.voxels.signals)
    # Negative control: by part of a cell, other voxels share a cell.
    moved = merge(dataclasses.replace(voxels, coordinates=voxels.coordinates + 1), 3, 40)
    assert not np.array_equal(moved.index, plain.index)


# Neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize(("chunk", "neighbors"), [(4, 3), (16, 16), (128, 1)])
def test_neighbours_are_those_of_brute_force(rng, lattice, chunk, neighbors):
    keys = sorted_scene(rng, lattice=lattice)
    queries = sorted_scene(rng, count=21, size=9, lattice=lattice)
    places, distances = search(queries, keys, neighbors, chunk=chunk)
    positions = [np.asarray(one.coordinates + one.signals[:, :3])[np.asarray(one.mask)] for one in (queries, keys)]
    every = np.sqrt(np.sum((positions[0][:, None] - positions[1][None]) ** 2, axis=-1))
    # A stable sort: of equally near ones (on a lattice most are) the first in the list.
    expected = np.argsort(every, axis=-1, kind="stable")[:, :neighbors]
    np.testing.assert_array_equal(places[:21], expected)
    np.testing.assert_allclose(distances[:21], np.take_along_axis(every, expected, -1), atol=1e-5)


@pytest.mark.parametrize("count", [0, 2])
def test_missing_neighbours_are_marked(rng, count):
    keys, queries = sorted_scene(rng, count=count), sorted_scene(rng, count=5)
    places, distances = search(queries, keys, 3, chunk=4)
    assert np.all(places[:5, :count] >= 0)
    assert np.all(places[:, count:] == -1)
    assert np.all(np.isinf(distances[:, count:]))
    x = jnp.ones((keys.mask.shape[0], 2))
    np.testing.assert_allclose(interpolate(x, places, distances)[:5], 1.0 if count else 0.0, rtol=1e-6)


def test_neighbours_of_a_batch_are_those_of_each_scene(rng):
    keys, queries = ([sorted_scene(rng, count=count) for count in (30, 7)] for _ in range(2))
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    together = search(stack(*queries), stack(*keys), 3, chunk=4)
    for index in range(2):
        alone = search(queries[index], keys[index], 3, chunk=4)
        held = queries[index].mask
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(found[index][held], expected[held])


def test_search_is_differentiated_around(rng):
    keys = sorted_scene(rng)

    def total(signals):
        voxels = dataclasses.replace(keys, signals=signals)
        return jnp.sum(interpolate(voxels.signals, *nearest_voxels(voxels, voxels, 2))[:40])

    gradient = jax.jit(jax.grad(total))(keys.signals)
    # Each voxel's nearest is itself, at distance 0: it has all the weight.
    np.testing.assert_allclose(gradient[:40], 1.0, atol=1e-5)


def test_interpolation_weighs_by_inverse_distance():
    x = jnp.asarray([[1.0], [10.0], [100.0]])
    found = interpolate(x, jnp.asarray([[0, 1], [2, 0], [1, -1]]), jnp.asarray([[1.0, 3.0], [0.0, 1.0], [5.0, np.inf]]))
    np.testing.assert_allclose(found[:, 0], [(1 + 10 / 3) / (4 / 3), 100, 10], rtol=1e-5)


# Memory and errors -----------------------------------------------------------------------------------------------


def test_nothing_is_quadratic_in_the_length_of_the_list():
    def largest(length):
        voxels = Voxels(
            jax.ShapeDtypeStruct((length, 3), jnp.int32),
            jax.ShapeDtypeStruct((length, 6), jnp.float32),
            jax.ShapeDtypeStruct((length,), jnp.bool_),
        )

        def everything(voxels):
            merged = downsample_voxels(voxels, 2, length)
            return nearest_voxels(merged.points, voxels, 4), find_voxels(
                voxels.coordinates, voxels.mask, voxels.coordinates
            )

        return jax.jit(everything).lower(voxels).compile().memory_analysis().temp_size_in_bytes

    sizes = [largest(length) for length in (512, 1024, 2048)]
    assert sizes[0] > 0
    # Boxes of runs of 128 meet each other: (n / 128)^2 numbers, few beside 128 n.
    assert sizes[2] - sizes[1] <= 2.2 * (sizes[1] - sizes[0])


def test_wrong_numbers_are_refused(rng, untyped):
    voxels = sorted_scene(rng)
    with pytest.raises(ValueError, match="window=0 must be positive; set window"):
        window_cells(voxels.coordinates, voxels.mask, 0)
    with pytest.raises(ValueError, match=r"size=0.0 and capacity=4 must be positive"):
        voxelize(voxels.signals[:, :3], voxels.signals, 0.0, 4)
    with pytest.raises(ValueError, match="stride=0 and capacity=3 must be positive"):
        downsample_voxels(voxels, 0, 3)
    with pytest.raises(ValueError, match="neighbors=0 and chunk=128 must be positive"):
        nearest_voxels(voxels, voxels, 0)

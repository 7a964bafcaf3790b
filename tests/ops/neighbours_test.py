import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial

from jaxlayers.ops.neighbours import (
    count_within_radius,
    displacements,
    everyone,
    farthest_points,
    gather,
    images_within,
    k_nearest,
    within_radius,
)
from jaxlayers.testing import SpecialEuclidean

SQUARE = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
SKEWED = np.array([[1.0, 0.0, 0.0], [0.7, 0.9, 0.0], [-0.4, 0.5, 0.8]])


def pairs(neighbours):
    """Return the lists as sets of indices, without padding."""
    indices, mask = np.asarray(neighbours.indices), np.asarray(neighbours.mask)
    return [set(row[kept].tolist()) for row, kept in zip(indices, mask, strict=True)]


# k_nearest ----------------------------------------------------------------------------------------------------------


def test_k_nearest_equals_a_tree_search(rng):
    positions = rng.normal(size=(2, 30, 3)).astype(np.float32)
    queries = rng.normal(size=(2, 7, 3)).astype(np.float32)
    found = k_nearest(jnp.asarray(positions), 6)
    asked = k_nearest(jnp.asarray(positions), 6, queries=jnp.asarray(queries))
    for batch in range(2):
        tree = scipy.spatial.cKDTree(positions[batch])
        np.testing.assert_array_equal(found.indices[batch], tree.query(positions[batch], 7)[1][:, 1:])
        np.testing.assert_array_equal(asked.indices[batch], tree.query(queries[batch], 6)[1])
    assert bool(jnp.all(found.mask))
    assert bool(jnp.all(asked.mask))


def test_ties_go_by_index_and_self_comes_first_if_asked_for():
    points = jnp.asarray(np.concatenate([SQUARE, SQUARE[:1]]))
    assert k_nearest(points, 3).indices.tolist() == [[4, 1, 2], [0, 3, 4], [0, 3, 4], [1, 2, 0], [0, 1, 2]]
    assert k_nearest(points, 2, include_self=True).indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert k_nearest(points, 1, queries=points[4:]).indices.tolist() == [[0]]


def test_padding_is_nobodys_neighbour_and_has_none(rng):
    positions = rng.normal(size=(9, 3)).astype(np.float32)
    positions[[2, 5]] = np.nan
    mask = np.isin(np.arange(9), [2, 5], invert=True)
    found = k_nearest(jnp.asarray(positions), 8, mask=jnp.asarray(mask))
    alone = k_nearest(jnp.asarray(positions[mask]), 6)
    np.testing.assert_array_equal(found.indices[mask][:, :6], np.flatnonzero(mask)[np.asarray(alone.indices)])
    assert not found.mask[~mask].any()
    assert not found.mask[:, 6:].any()
    assert not found.indices[~found.mask].any()
    near = within_radius(jnp.asarray(positions), 1.5, 8, mask=jnp.asarray(mask), cell=jnp.eye(3) * 2.0)
    assert not near.mask[~mask].any()
    assert not set(np.asarray(near.indices)[np.asarray(near.mask)].tolist()) & {2, 5}
    # Coordinates of padding reach nothing, not even as NaN.
    assert bool(jnp.all(jnp.isfinite(displacements(jnp.asarray(positions), near)[mask])))


@pytest.mark.parametrize("count", [1, 2])
def test_lists_longer_than_the_cloud_are_padded(count):
    found = k_nearest(jnp.zeros((3, count, 3)), 4)
    assert found.indices.shape == (3, count, 4)
    assert np.asarray(found.mask).sum() == 3 * count * (count - 1)


def test_an_empty_cloud_has_empty_lists():
    assert k_nearest(jnp.zeros((2, 0, 3)), 3).indices.shape == (2, 0, 3)
    assert within_radius(jnp.zeros((0, 3)), 1.0, 3).mask.shape == (0, 3)
    nobody = k_nearest(jnp.zeros((5, 3)), 2, mask=jnp.zeros(5, bool))
    assert not nobody.mask.any()


def test_nan_points_are_neighbours_of_everyone(rng):
    positions = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32).at[4, 1].set(jnp.nan)
    for found in (k_nearest(positions, 2), within_radius(positions, 0.1, 2)):
        assert found.indices[:4, 0].tolist() == [4] * 4
        assert bool(jnp.all(found.mask[:, 0]))
        assert bool(jnp.all(jnp.any(jnp.isnan(displacements(positions, found)), axis=(-2, -1))))
    cell = within_radius(positions, 0.1, 8, cell=jnp.eye(3) * 9.0)
    assert bool(jnp.all(jnp.any(cell.indices == 4, axis=-1)))
    assert bool(jnp.any(farthest_points(positions, 3) == 4))


def test_lists_turn_with_nothing_and_permute_with_the_points(rng):
    positions = rng.normal(size=(12, 3))
    moved = SpecialEuclidean(3).act(SpecialEuclidean(3).sample(rng), positions, "points")
    order = rng.permutation(12)
    found = k_nearest(jnp.asarray(positions), 4)
    np.testing.assert_array_equal(found.indices, k_nearest(jnp.asarray(moved), 4).indices)
    np.testing.assert_array_equal(
        order[np.asarray(k_nearest(jnp.asarray(positions[order]), 4).indices)], found.indices[order]
    )


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 40])
def test_lists_found_in_chunks_are_those_found_at_once(rng, chunk):
    positions = jnp.asarray(rng.integers(0, 3, size=(2, 13, 3)), jnp.float32)  # with ties
    queries = jnp.asarray(rng.normal(size=(2, 7, 3)), jnp.float32)
    mask = jnp.asarray(rng.random(size=(2, 13)) < 0.8)
    for options in ({}, {"mask": mask}, {"include_self": True}, {"queries": queries, "mask": mask}):
        whole, found = (k_nearest(positions, 4, **options, chunk=each) for each in (None, chunk))
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_array_equal(found.mask, whole.mask)
    with pytest.raises(ValueError, match="chunk=0 must be positive"):
        k_nearest(positions, 4, chunk=0)


def test_memory_of_chunks_grows_with_the_points_and_not_with_their_square():
    def temporaries(points, chunk):
        cloud = jax.ShapeDtypeStruct((points, 3), jnp.float32)
        find = jax.jit(lambda x: k_nearest(x, 8, chunk=chunk))
        return find.lower(cloud).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = ([temporaries(points, chunk) for points in (512, 2048)] for chunk in (None, 16))
    assert whole[1] > 12 * whole[0]
    assert chunked[1] < 5 * chunked[0]
    assert chunked[1] < whole[1] / 50


# within_radius ------------------------------------------------------------------------------------------------------


def test_within_radius_equals_a_tree_search_and_counts_what_does_not_fit(rng):
    positions = rng.normal(size=(25, 3)).astype(np.float32)
    expected = [
        set(row) - {i} for i, row in enumerate(scipy.spatial.cKDTree(positions).query_ball_point(positions, 1.1))
    ]
    most = max(map(len, expected))
    assert pairs(within_radius(jnp.asarray(positions), 1.1, most)) == expected
    counts = count_within_radius(jnp.asarray(positions), 1.1)
    assert counts.tolist() == [len(row) for row in expected]
    tight = within_radius(jnp.asarray(positions), 1.1, 2)
    nearest = k_nearest(jnp.asarray(positions), 2)
    np.testing.assert_array_equal(jnp.sum(tight.mask, axis=-1), jnp.minimum(counts, 2))
    np.testing.assert_array_equal(tight.indices, jnp.where(tight.mask, nearest.indices, 0))
    assert int(jnp.max(counts - 2)) > 0


def brute_force(positions, cell, radius, reach):
    """Return {(i, j, lattice coordinates)} of all images within the radius."""
    images = np.array(list(itertools.product(range(-reach, reach + 1), repeat=len(cell))))
    found = set()
    for i, j in itertools.product(range(len(positions)), repeat=2):
        lengths = np.linalg.norm(positions[j] + images @ cell - positions[i], axis=-1)
        near = images[(lengths <= radius) & (np.any(images != 0, axis=-1) | (i != j))]
        found |= {(i, j, tuple(image)) for image in near.tolist()}
    return found


CELLS = {
    "cubic, minimum image": (np.eye(3) * 2.0, 0.95, 0),
    "cubic, several images": (np.eye(3), 1.3, 1),
    "skewed": (SKEWED, 0.95, 2),
    "flat and skewed": (np.array([[1.0, 0.0], [1.7, 0.3]]), 0.7, 4),
}


@pytest.mark.parametrize("name", CELLS)
def test_periodic_neighbours_are_all_images_within_the_radius(name, rng):
    cell, radius, images = CELLS[name]
    # Out of the cell too, where the nearest image is several cells away.
    positions = rng.uniform(-1.5, 2.5, (3, len(cell))).astype(np.float32)
    expected = brute_force(positions.astype(np.float64), cell, radius, reach={2: 40, 3: 14}[len(cell)])
    assert images_within(cell, radius) == images
    cell = cell.astype(np.float32)
    counts = count_within_radius(jnp.asarray(positions), radius, cell=cell)
    found = within_radius(jnp.asarray(positions), radius, int(jnp.max(counts)), cell=cell)
    lattice = np.rint(np.asarray(found.shifts) @ np.linalg.inv(cell)).astype(int)
    entries = {
        (i, int(found.indices[i, k]), tuple(lattice[i, k].tolist()))
        for i, k in np.argwhere(np.asarray(found.mask)).tolist()
    }
    assert entries == expected
    assert len(expected) == int(jnp.sum(counts)) == int(jnp.sum(found.mask))
    lengths = np.linalg.norm(displacements(jnp.asarray(positions), found), axis=-1)
    assert (lengths[found.mask] <= radius + 1e-5).all()
    assert not lengths[~found.mask].any()
    # The control: the nearest image alone is not enough.
    if images:
        fewer = count_within_radius(jnp.asarray(positions), radius, cell=cell, images=0)
        assert int(jnp.sum(fewer)) < len(expected)


def test_lattice_translations_of_points_and_bases_of_the_lattice_change_no_distance(rng):
    positions = rng.uniform(0, 1, (5, 3)).astype(np.float32)
    moved = positions + rng.integers(-3, 4, (5, 3)) @ SKEWED.astype(np.float32)
    other = (np.array([[1, 0, 0], [1, 1, 0], [0, -1, 1]]) @ SKEWED).astype(np.float32)

    def lengths(points, cell):
        found = within_radius(jnp.asarray(points), 0.93, 40, cell=cell)
        return np.sort(np.linalg.norm(displacements(jnp.asarray(points), found), axis=-1), axis=-1)

    reference = lengths(positions, SKEWED.astype(np.float32))
    np.testing.assert_allclose(lengths(moved, SKEWED.astype(np.float32)), reference, atol=2e-6)
    np.testing.assert_allclose(lengths(positions, other), reference, atol=2e-6)


def test_every_cloud_of_a_batch_may_have_its_own_cell_also_under_jit(rng):
    positions = jnp.asarray(rng.uniform(0, 1, (2, 4, 3)), jnp.float32)
    cells = jnp.asarray(np.stack([np.eye(3), SKEWED]), jnp.float32)
    batched = jax.jit(lambda x, cell: within_radius(x, 0.6, 12, cell=cell, images=1))(positions, cells)
    for index in range(2):
        single = within_radius(positions[index], 0.6, 12, cell=cells[index], images=1)
        np.testing.assert_array_equal(batched.indices[index], single.indices)
        np.testing.assert_allclose(batched.shifts[index], single.shifts, atol=1e-6)


def test_strain_derivative_flows_through_the_shifts(rng):
    positions = jnp.asarray(rng.uniform(0, 1, (4, 3)), jnp.float32)
    cell = jnp.asarray(SKEWED, jnp.float32)

    @jax.jit
    def energy(strain):
        deform = jnp.eye(3) + strain
        moved = within_radius(positions @ deform, 0.85, 16, cell=cell @ deform, images=1)
        return jnp.sum(jnp.square(displacements(positions @ deform, moved)))

    gradient = jax.grad(energy)(jnp.zeros((3, 3)))
    step = jnp.zeros((3, 3)).at[0, 1].set(1e-3)
    np.testing.assert_allclose((energy(step) - energy(-step)) / 2e-3, gradient[0, 1], rtol=1e-2)


# everyone, gather, displacements --------------------------------------------------------------------------------------


def test_everyone_lists_all_others(rng):
    assert pairs(everyone(4)) == [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}]
    mask = jnp.array([[True, False, True], [True, True, True]])
    assert pairs(jax.tree.map(lambda x: x[0], everyone(mask))) == [{2}, set(), {0}]
    assert everyone(1).indices.shape == (1, 0)


def test_gather_and_displacements_equal_loops(rng):
    positions = rng.normal(size=(2, 5, 3)).astype(np.float32)
    found = k_nearest(jnp.asarray(positions), 2)
    taken, vectors = gather(jnp.asarray(positions), found.indices), displacements(jnp.asarray(positions), found)
    for b, i, k in itertools.product(range(2), range(5), range(2)):
        j = int(found.indices[b, i, k])
        np.testing.assert_array_equal(taken[b, i, k], positions[b, j])
        np.testing.assert_array_equal(vectors[b, i, k], positions[b, j] - positions[b, i])
    deep = gather(jnp.asarray(rng.normal(size=(2, 5, 4, 3))), found.indices)
    assert deep.shape == (2, 5, 2, 4, 3)
    centres = jnp.asarray(positions[:, :2])
    asked = k_nearest(jnp.asarray(positions), 2, queries=centres)
    assert not displacements(jnp.asarray(positions), asked, queries=centres)[:, :, 0].any()


def test_gradients_flow_through_vectors_and_not_into_padding(rng):
    positions = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    mask = jnp.arange(5) < 4

    def energy(x):
        return jnp.sum(jnp.square(displacements(x, k_nearest(x, 3, mask=mask))))

    gradient = jax.grad(energy)(positions)
    np.testing.assert_allclose(gradient[:4], 4 * (4 * positions - jnp.sum(positions[:4], axis=0))[:4], atol=1e-4)
    assert not gradient[4].any()


# farthest_points ------------------------------------------------------------------------------------------------------


def test_farthest_points_equal_a_greedy_loop(rng):
    positions = rng.normal(size=(2, 20, 3))
    mask = np.arange(20) < np.array([[20], [13]])
    positions[~mask] = np.nan
    found = np.asarray(farthest_points(jnp.asarray(positions), 6, mask=jnp.asarray(mask)))
    for cloud, present, chosen in zip(positions, mask, found, strict=True):
        cloud = cloud[present]
        expected = [int(np.argmax(np.linalg.norm(cloud - cloud.mean(axis=0), axis=-1)))]
        while len(expected) < 6:
            distance = np.linalg.norm(cloud[:, None] - cloud[expected], axis=-1).min(axis=-1)
            expected.append(int(np.argmax(distance)))
        assert chosen.tolist() == expected


def test_farthest_points_move_and_permute_with_the_cloud(rng):
    positions = rng.normal(size=(15, 3))
    group, order = SpecialEuclidean(3), rng.permutation(15)
    moved = group.act(group.sample(rng), positions, "points")[order]
    np.testing.assert_array_equal(
        order[np.asarray(farthest_points(jnp.asarray(moved), 5))], farthest_points(jnp.asarray(positions), 5)
    )


def test_points_that_run_out_come_again():
    points = jnp.asarray(SQUARE[[0, 1]])
    assert set(farthest_points(points, 5).tolist()) == {0, 1}
    assert farthest_points(points, 2, mask=jnp.array([False, True])).tolist() == [1, 1]


# Compilation and errors -----------------------------------------------------------------------------------------------


def test_all_is_one_compilation_for_all_positions(rng):
    traces = []

    @jax.jit
    def lists(x, mask):
        traces.append(1)
        near = within_radius(x, 1.0, 4, mask=mask)
        return k_nearest(x, 3, mask=mask), near, farthest_points(x, 3, mask=mask), everyone(mask)

    for count in range(1, 6):
        lists(jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32), jnp.broadcast_to(jnp.arange(8) < count, (2, 8)))
    assert len(traces) == 1


def test_bad_input_is_refused(untyped):
    points = jnp.zeros((4, 3))
    for match, call in (
        (r"k=0 must be positive", lambda: k_nearest(points, 0)),
        (r"must be \[\*batch, points, d\]", lambda: k_nearest(points[0], 1)),
        (r"mask of shape \(3,\) must be \(4,\)", lambda: k_nearest(points, 1, mask=jnp.ones(3, bool))),
        (r"queries of shape \(2, 2\)", lambda: k_nearest(points, 1, queries=jnp.zeros((2, 2)))),
        (r"capacity=0", lambda: within_radius(points, 1.0, 0)),
        (r"radius=-1.0 must be positive", lambda: within_radius(points, -1.0, 2)),
        (r"cell of shape \(2, 2\) must be", lambda: within_radius(points, 1.0, 2, cell=jnp.eye(2))),
        (r"must have independent rows", lambda: within_radius(points, 1.0, 2, cell=jnp.ones((3, 3)))),
        (r"images=-1", lambda: within_radius(points, 1.0, 2, cell=jnp.eye(3), images=-1)),
        (r"is traced.*images_within", lambda: jax.jit(lambda c: within_radius(points, 1.0, 2, cell=c))(jnp.eye(3))),
        (r"points=0 must be positive", lambda: everyone(0)),
        (r"must begin with the batch axes", lambda: gather(points[None], jnp.zeros((2, 4, 1), int))),
        (r"no points to take from", lambda: gather(points[:0], jnp.zeros((4, 1), int))),
        (r"must be lists", lambda: displacements(points[:2], everyone(4))),
        (r"count=0 must be positive", lambda: farthest_points(points, 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()

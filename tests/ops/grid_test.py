import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlayers.ops.windows import grid_mask, merge_grid, partition_grid, partition_windows

few = settings(max_examples=7, deadline=None, derandomize=True)
many = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def grids(draw, max_length=5):
    """Number of cells and size of a cell along one to three axes."""
    rank = draw(st.integers(1, 3))
    lengths = st.tuples(*[st.integers(1, max_length if rank < 3 else 3)] * rank)
    return draw(lengths), draw(lengths)


def entries(size, features=1):
    return jnp.arange(np.prod(size) * features, dtype=jnp.float32).reshape(1, *size, features)


def deal(numbers, grid):
    """`partition_grid` in NumPy, by strided slices: shapes are many here and each would be compiled."""
    strides = [length // cells for length, cells in zip(numbers.shape, grid, strict=True)]
    places = itertools.product(*map(range, strides))
    return np.stack([numbers[tuple(map(slice, place, [None] * len(grid), strides))].ravel() for place in places])


@few
@given(grids())
def test_merge_is_the_inverse_of_partition(example):
    grid, cell = example
    size = tuple(a * b for a, b in zip(grid, cell, strict=True))
    x = entries(size, 2)
    groups = partition_grid(x, grid)
    assert groups.shape == (1, np.prod(cell), np.prod(grid), 2)
    np.testing.assert_array_equal(merge_grid(groups, grid, size), x)


@few
@given(grids())
def test_groups_are_strided_slices(example):
    grid, cell = example
    x = entries(tuple(a * b for a, b in zip(grid, cell, strict=True)))
    found = np.asarray(partition_grid(x, grid))
    np.testing.assert_array_equal(found[0, ..., 0], deal(np.asarray(x)[0, ..., 0], grid))


def test_leading_axes_stay_as_they_are():
    x = jnp.arange(2 * 3 * 4 * 6 * 5, dtype=jnp.int32).reshape(2, 3, 4, 6, 5)
    groups = partition_grid(x, (2, 3))
    assert groups.shape == (2, 3, 4, 6, 5)
    np.testing.assert_array_equal(groups[1, 2], partition_grid(x[1, 2], (2, 3)))
    np.testing.assert_array_equal(merge_grid(groups, (2, 3), (4, 6)), x)


def test_groups_of_cells_are_windows_of_places_turned_round():
    # What windows put together, the grid takes apart: tokens and windows change places.
    x = entries((6, 8), 3)
    np.testing.assert_array_equal(partition_grid(x, (3, 4)), jnp.swapaxes(partition_windows(x, (2, 2)), 1, 2))
    # Control: a grid of as many cells as windows have places is another partition.
    assert np.any(np.asarray(partition_grid(x, (3, 4))) != np.asarray(partition_windows(x, (3, 4))))


@many
@given(grids(), st.data())
def test_mask_lets_true_tokens_meet_true_tokens_alone(example, data):
    grid, cell = example
    # Any size that is padded to these cells.
    size = tuple(data.draw(st.integers((b - 1) * a + 1, a * b)) for a, b in zip(grid, cell, strict=True))
    real = np.zeros([a * b for a, b in zip(grid, cell, strict=True)], bool)
    real[tuple(map(slice, size))] = True
    groups = deal(real, grid)
    mask = grid_mask(size, grid)
    assert (mask is None) == real.all()
    if mask is not None:
        expected = [[[a == b for b in one] for a in one] for one in groups]
        np.testing.assert_array_equal(mask, expected)
        assert mask.any(axis=-1).all(), "a query without keys would divide by zero"
    assert groups.any(axis=1).all(), "a group of padding alone would be work for nothing"


def test_masks_are_numpy():
    assert isinstance(grid_mask((5, 4), (2, 2)), np.ndarray)
    assert grid_mask((6, 4), (2, 2)) is None


def test_clear_errors():
    with pytest.raises(ValueError, match=r"spatial size \(5, 4\) must be divisible by the grid \(2, 2\); pad"):
        partition_grid(jnp.ones((1, 5, 4, 2)), (2, 2))
    with pytest.raises(ValueError, match=r"must be divisible by the grid \(0, 2\)"):
        partition_grid(jnp.ones((1, 4, 4, 2)), (0, 2))
    with pytest.raises(ValueError, match="2 spatial axes needs at least 3 axes"):
        partition_grid(jnp.ones((4, 2)), (2, 2))

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlayers.ops.windows import (
    fit_window,
    local_position_table,
    merge_windows,
    partition_windows,
    relative_position_bias,
    relative_position_index,
    shift,
    shift_mask,
    unshift,
    window_regions,
)

few = settings(max_examples=7, deadline=None, derandomize=True)
many = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def shapes(draw, max_length=7):
    """Size, window not larger than it, and shift within the window; one to three axes."""
    rank = draw(st.integers(1, 3))
    size = draw(st.tuples(*[st.integers(1, max_length if rank < 3 else 4)] * rank))
    window = tuple(draw(st.integers(1, min(length, 4))) for length in size)
    amount = tuple(draw(st.integers(0, step - 1)) for step in window)
    return size, window, amount


def entries(size, features=1):
    return jnp.arange(np.prod(size) * features, dtype=jnp.float32).reshape(1, *size, features)


@few
@given(shapes())
def test_merge_is_the_inverse_of_partition(example):
    grid, window, _ = example
    size = tuple(a * b for a, b in zip(grid, window, strict=True))
    x = entries(size, 2)
    windows = partition_windows(x, window)
    assert windows.shape == (1, np.prod(grid), np.prod(window), 2)
    np.testing.assert_array_equal(merge_windows(windows, window, size), x)


@few
@given(shapes())
def test_windows_are_the_slices_of_a_loop(example):
    grid, window, _ = example
    x = entries(tuple(a * b for a, b in zip(grid, window, strict=True)))
    found = np.asarray(partition_windows(x, window))
    np.testing.assert_array_equal(found[0, ..., 0], cut(np.asarray(x)[0, ..., 0], window))


@few
@given(shapes())
def test_unshift_is_the_inverse_of_shift(example):
    size, _, amount = example
    x = entries(size)
    shifted = shift(x, amount)
    assert shifted[(0, *[0] * len(size), 0)] == x[(0, *amount, 0)]
    np.testing.assert_array_equal(unshift(shifted, amount), x)


def cut(numbers, window):
    """`partition_windows` in NumPy, window by window: shapes are many here and each would be compiled."""
    grid = [length // step for length, step in zip(numbers.shape, window, strict=True)]
    slices = [
        tuple(slice(a * b, (a + 1) * b) for a, b in zip(place, window, strict=True))
        for place in itertools.product(*map(range, grid))
    ]
    return np.stack([numbers[one].ravel() for one in slices])


def true_groups(size, window, amount):
    """The shifted windows without any rolling: an axis is cut at `amount`, `amount + window`, and so on."""
    padded = [-(-length // step) * step for length, step in zip(size, window, strict=True)]
    axes = [(np.arange(whole) - by) // step for whole, step, by in zip(padded, window, amount, strict=True)]
    group = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    real = np.zeros(padded, bool)
    real[tuple(slice(length) for length in size)] = True
    return group, real


@many
@given(shapes(), st.booleans())
def test_mask_lets_meet_exactly_the_tokens_of_one_uncut_window(example, mask_padding):
    size, window, amount = example
    group, real = true_groups(size, window, amount)
    numbers = np.arange(real.size).reshape(real.shape)
    rolled = np.roll(numbers, [-by for by in amount], tuple(range(len(size))))
    tokens = cut(rolled, window)
    mask = shift_mask(size, window, amount, mask_padding=mask_padding)
    if mask is None:
        mask = np.ones((*tokens.shape, tokens.shape[-1]), bool)
    group, real = group.reshape(-1, len(size)), real.ravel()
    for window_index, one in enumerate(tokens):
        for (i, query), (j, key) in itertools.product(enumerate(one), enumerate(one)):
            if real[query] or not mask_padding:
                expected = (group[query] == group[key]).all() and (real[key] or not mask_padding)
                assert mask[window_index, i, j] == expected
    assert mask.any(axis=-1).all(), "a query without keys would divide by zero"


@many
@given(shapes())
def test_rolled_windows_hold_each_uncut_window_whole(example):
    # Two tokens of one uncut window must share a rolled window too, or attention would be lost.
    size, window, amount = example
    group, _ = true_groups(size, window, amount)
    rolled = np.roll(group, [-by for by in amount], tuple(range(len(size))))
    home = {}
    windows = np.stack([cut(rolled[..., axis], window) for axis in range(len(size))], axis=-1)
    for index, one in enumerate(windows):
        for label in {tuple(token) for token in one}:
            assert home.setdefault(label, index) == index


def test_no_mask_where_all_may_meet():
    assert shift_mask((8, 6), (4, 3), (0, 0)) is None
    assert shift_mask((7, 6), (4, 3), (0, 0)) is None
    assert shift_mask((7, 6), (4, 3), (0, 0), mask_padding=True) is not None
    assert shift_mask((8, 6), (4, 3), (2, 0)) is not None


def test_only_the_last_windows_of_a_shifted_axis_are_masked():
    mask = shift_mask((12, 8), (4, 4), (2, 0)).reshape(3, 2, 16, 16)
    assert mask[:-1].all()
    assert not mask[-1].all(axis=(-1, -2)).any()


def test_constants_are_numpy():
    assert isinstance(window_regions((5,), (2,), (1,)), np.ndarray)
    assert isinstance(shift_mask((5,), (2,), (1,)), np.ndarray)
    assert isinstance(relative_position_index((2,)), np.ndarray)


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2))
def test_relative_index_is_one_row_an_offset(window, larger):
    table_window = [length + larger for length in window]
    index = relative_position_index(window, table_window)
    positions = list(itertools.product(*map(range, window)))
    offsets = list(itertools.product(*(range(1 - length, length) for length in table_window)))
    for (i, p), (j, q) in itertools.product(enumerate(positions), enumerate(positions)):
        assert offsets[index[i, j]] == tuple(a - b for a, b in zip(p, q, strict=True))


def test_a_smaller_window_reads_the_same_bias_for_the_same_offset(rng):
    table = jnp.asarray(rng.normal(size=(7 * 5, 2)), jnp.float32)
    whole = np.asarray(relative_position_bias(table, (4, 3))).reshape(2, 4, 3, 4, 3)
    part = np.asarray(relative_position_bias(table, (2, 3), (4, 3))).reshape(2, 2, 3, 2, 3)
    np.testing.assert_array_equal(part, whole[:, :2, :, :2])


def test_a_local_table_begins_as_a_gaussian_of_the_distance():
    table = local_position_table(1.5, stddev=1e-6)(jax.random.key(0), (7 * 7, 2), jnp.float32)
    weights = np.exp(np.asarray(relative_position_bias(table, (4, 4))))
    places = np.stack(np.divmod(np.arange(16), 4), axis=-1)
    squares = np.square(places[:, None] - places[None]).sum(-1)
    np.testing.assert_allclose(weights, np.broadcast_to(np.exp(-squares / 4.5), (2, 16, 16)), atol=1e-5)


def test_window_is_clipped_and_not_shifted_along_short_axes_only():
    assert fit_window((10, 10), (4, 4), (2, 2)) == ((4, 4), (2, 2))
    assert fit_window((4, 10), (4, 4), (2, 2)) == ((4, 4), (0, 2))
    assert fit_window((3, 5), (4, 4), (2, 2)) == ((3, 4), (0, 2))


def test_clear_errors():
    with pytest.raises(ValueError, match=r"window_size=\(0, 4\) must be positive"):
        fit_window((8, 8), (0, 4), (0, 0))
    with pytest.raises(ValueError, match=r"shift_size=\(4, 0\) must lie in \[0, window_size=\(4, 4\)\)"):
        fit_window((8, 8), (4, 4), (4, 0))
    with pytest.raises(ValueError, match=r"window \(5, 4\) must not exceed the table's window_size=\(4, 4\)"):
        relative_position_index((5, 4), (4, 4))
    with pytest.raises(ValueError, match=r"table of shape \(9, 2\) must have 25 rows"):
        relative_position_bias(jnp.ones((9, 2)), (3, 3))
    with pytest.raises(ValueError, match=r"reach=0 must be positive"):
        local_position_table(0)
    with pytest.raises(ValueError, match=r"a table of 15 rows must be that of a square window"):
        local_position_table(1)(jax.random.key(0), (15, 2))

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.block_attention import block_attention, criss_cross, dense_attention, neighbourhood

GRIDS = [(1,), (5,), (1, 4), (3, 3), (4, 2), (2, 3, 4), (1, 1, 1)]


def as_matrix(lists):
    """Return which block [row] sees which [column]; every block is listed at most once."""
    index, valid = lists
    matrix = np.zeros((len(index), len(index)), int)
    for row, (numbers, counts) in enumerate(zip(index, valid, strict=True)):
        assert len(set(numbers)) == len(numbers)
        matrix[row, numbers[counts]] += 1
    return matrix.astype(bool)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_neighbourhood_is_the_blocks_within_the_radius(grid, radius):
    places = list(itertools.product(*map(range, grid)))
    expected = [[all(abs(a - b) <= radius for a, b in zip(p, q, strict=True)) for q in places] for p in places]
    lists = neighbourhood(grid, radius)
    np.testing.assert_array_equal(as_matrix(lists), expected)
    # No row has more entries than the largest neighbourhood needs.
    assert lists[0].shape[1] == np.prod([min(2 * radius + 1, length) for length in grid])


@pytest.mark.parametrize("grid", GRIDS)
def test_criss_cross_is_the_blocks_that_share_a_coordinate(grid):
    places = list(itertools.product(*map(range, grid)))
    expected = [[any(a == b for a, b in zip(p, q, strict=True)) for q in places] for p in places]
    lists = criss_cross(grid)
    np.testing.assert_array_equal(as_matrix(lists), expected)
    assert lists[1].all()


def test_grids_and_radii_must_be_possible():
    with pytest.raises(ValueError, match="radius=-1 must not be negative"):
        neighbourhood((3, 3), -1)
    for make in (neighbourhood, criss_cross):
        with pytest.raises(ValueError, match=r"grid=\(3, 0\) must have a positive entry"):
            make((3, 0))
        with pytest.raises(ValueError, match=r"grid=\(\) must have"):
            make(())


def random(rng, *shapes):
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_is_that_of_jax(masked, rng):
    query, key, value = random(rng, (2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3))
    mask = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.5).at[..., 0].set(True) if masked else None
    for scale in (None, 0.3):
        expected = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
        found = dense_attention(query, key, value, mask=mask, scale=scale)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(dense_attention(query, key, value, scale=0.3) - dense_attention(query, key, value)).max() > 0.01
    with pytest.raises(ValueError, match="the 4 heads of the queries must be a multiple of the 3"):
        dense_attention(query, key[:, :, :1].repeat(3, 2), value[:, :, :1].repeat(3, 2))


def test_blocks_attend_to_their_lists_and_to_what_all_share(rng):
    # Four blocks of three queries and two keys in two heads; two more keys that every block sees.
    query, key, value, *shared = random(
        rng, (2, 4, 3, 2, 5), (2, 4, 2, 2, 5), (2, 4, 2, 2, 6), (2, 2, 2, 5), (2, 2, 2, 6)
    )
    index = np.array([[0, 1], [3, 2], [2, 0], [3, 1]], np.int32)
    valid = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
    real = np.ones((4, 2), bool)
    real[3, 1] = False
    shared_mask = jnp.asarray([[True, True], [True, False]])
    run = functools.partial(
        block_attention,
        blocks=(index, valid),
        key_mask=real,
        shared=tuple(shared),
        shared_mask=shared_mask,
        scale=0.7,
    )
    found = jax.jit(run)(query, key, value)
    for batch, block, row, head in itertools.product(range(2), range(4), range(3), range(2)):
        seen = [
            (key[batch, other, k, head], value[batch, other, k, head])
            for other, counts in zip(index[block], valid[block], strict=True)
            for k in range(2)
            if counts and real[other, k]
        ]
        seen += [
            (shared[0][batch, k, head], shared[1][batch, k, head]) for k in range(2) if bool(shared_mask[batch, k])
        ]
        keys, values = (np.array(part) for part in zip(*seen, strict=True))
        weights = np.exp(0.7 * keys @ np.asarray(query[batch, block, row, head]))
        np.testing.assert_allclose(found[batch, block, row, head], weights @ values / weights.sum(), atol=1e-5)
    # In parts, of which the last is shorter, nothing changes.
    np.testing.assert_allclose(jax.jit(functools.partial(run, blocks_at_once=3))(query, key, value), found, atol=1e-6)


def test_lists_must_be_of_the_blocks(rng):
    query, key = random(rng, (1, 4, 3, 1, 2), (1, 4, 3, 1, 2))
    with pytest.raises(ValueError, match=r"lists of shapes \(3, 3\) and \(3, 3\) must be of the 4 blocks"):
        block_attention(query, key, key, neighbourhood((3,)))
    with pytest.raises(ValueError, match="blocks_at_once=0 must be positive"):
        block_attention(query, key, key, neighbourhood((4,)), blocks_at_once=0)
    with pytest.raises(ValueError, match=r"shared_mask of shape \(1, 2\) must be of the shared tokens"):
        block_attention(query, key, key, neighbourhood((4,)), shared_mask=jnp.ones((1, 2), bool))

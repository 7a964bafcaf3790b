import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlayers.ops.patches import (
    crop,
    from_blocks,
    from_patches,
    pad_to_multiple,
    split_shape,
    to_blocks,
    to_patches,
)

few = settings(max_examples=7, deadline=None, derandomize=True)


@st.composite
def arrays(draw):
    """An array of one to three spatial axes, and a block that divides them."""
    rank = draw(st.integers(1, 3))
    block = draw(st.tuples(*[st.integers(1, 3)] * rank))
    grid = draw(st.tuples(*[st.integers(1, 3)] * rank))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    shape = (*batch, *(a * b for a, b in zip(grid, block, strict=True)), draw(st.integers(1, 2)))
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape), block


@few
@given(arrays())
def test_blocks_hold_the_pixels_of_a_loop_and_come_back(example):
    x, block = example
    rank = len(block)
    pixels, blocks = np.asarray(x), np.asarray(to_blocks(x, block))
    grid = [length // step for length, step in zip(x.shape[-1 - rank : -1], block, strict=True)]
    for place in itertools.product(*map(range, grid)):
        for pixel in itertools.product(*map(range, block)):
            at = tuple(g * b + p for g, b, p in zip(place, block, pixel, strict=True))
            np.testing.assert_array_equal(blocks[(..., *place, *pixel, slice(None))], pixels[(..., *at, slice(None))])
    np.testing.assert_array_equal(from_blocks(jnp.asarray(blocks), rank), x)


@few
@given(arrays(), st.booleans())
def test_patches_hold_the_pixels_of_a_loop_and_come_back(example, first_axis_fastest):
    x, patch = example
    rank = len(patch)
    found = np.asarray(to_patches(x, patch, first_axis_fastest=first_axis_fastest))
    order = list(itertools.product(*map(range, patch)))
    if first_axis_fastest:
        order.sort(key=lambda pixel: pixel[::-1])
    for place in itertools.product(*map(range, found.shape[-1 - rank : -1])):
        pixels = [tuple(g * b + p for g, b, p in zip(place, patch, pixel, strict=True)) for pixel in order]
        expected = np.concatenate([np.asarray(x)[(..., *pixel, slice(None))] for pixel in pixels], axis=-1)
        np.testing.assert_array_equal(found[(..., *place, slice(None))], expected)
    np.testing.assert_array_equal(from_patches(jnp.asarray(found), patch, first_axis_fastest=first_axis_fastest), x)


@few
@given(arrays(), st.integers(1, 4))
def test_padding_adds_zeros_at_the_ends_and_crop_takes_them_away(example, multiple):
    x, block = example
    x = x + 1
    size = x.shape[-1 - len(block) : -1]
    padded = pad_to_multiple(x, (multiple,) * len(block))
    assert all(0 <= new - old < multiple for new, old in zip(padded.shape[-1 - len(block) : -1], size, strict=True))
    assert all(new % multiple == 0 for new in padded.shape[-1 - len(block) : -1])
    np.testing.assert_array_equal(crop(padded, size), x)
    np.testing.assert_allclose(np.sum(padded), np.sum(x), rtol=1e-6)


def test_clear_errors():
    with pytest.raises(ValueError, match=r"spatial size \(5, 4\) must be divisible by the block \(2, 2\); pad"):
        to_blocks(jnp.ones((1, 5, 4, 3)), (2, 2))
    with pytest.raises(ValueError, match="features=5 must be divisible by the 4 pixels"):
        from_patches(jnp.ones((2, 2, 5)), (2, 2))
    with pytest.raises(ValueError, match=r"2 spatial axes needs at least 3 axes; got shape \(3, 4\)"):
        split_shape((3, 4), 2)
    with pytest.raises(ValueError, match=r"spatial size \(0, 4\) must not be empty"):
        split_shape((1, 0, 4, 3), 2)

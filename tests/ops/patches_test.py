import itertools

import jax
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
    project_normed_patches,
    project_patches,
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


def patch_problem(dtype=jnp.float32):
    """Return a map of 4 x 6 pixels and 3 features, scale, offset and weights of patches of 2 x 3."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 4, 6, 3), (18,), (18,), (18, 5))
    x, *rest = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return (x + 2).astype(dtype), *rest


def plainly_projected(x, scale, offset, kernel, first_axis_fastest=True):
    patches = to_patches(x, (2, 3), first_axis_fastest=first_axis_fastest)
    mean, variance = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True)
    return ((patches - mean) / jnp.sqrt(variance + 1e-5) * scale + offset) @ kernel


def test_patches_are_projected_by_a_convolution():
    x, _, _, kernel = patch_problem()
    found = project_patches(x, (2, 3), kernel)
    np.testing.assert_allclose(found, to_patches(x, (2, 3), first_axis_fastest=True) @ kernel, rtol=0, atol=1e-5)
    # Negative control: pixels in the other order are other patches.
    assert np.abs(found - to_patches(x, (2, 3)) @ kernel).max() > 0.1


def test_normed_patches_are_projected_by_a_convolution_as_they_are_one_by_one():
    problem = patch_problem()

    def both(function):
        out, back = jax.vjp(function, *problem)
        return out, *back(jnp.sin(out))

    found = both(lambda *operands: project_normed_patches(operands[0], (2, 3), *operands[1:], epsilon=1e-5))
    for one, other in zip(found, both(plainly_projected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    # Negative control: pixels in the other order are other patches.
    assert np.abs(found[0] - plainly_projected(*problem, first_axis_fastest=False)).max() > 0.1


def test_normed_patches_of_bfloat16_keep_what_is_far_from_zero():
    x, *rest = patch_problem(jnp.bfloat16)
    exact = plainly_projected(x.astype(jnp.float32), *rest)
    found = project_normed_patches(x, (2, 3), *rest, epsilon=1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0, atol=0.02 * np.abs(exact).max())


def test_clear_errors():
    with pytest.raises(ValueError, match=r"map of \(4, 5\) must be a multiple of patch=\(2, 3\)"):
        x, *rest = patch_problem()
        project_normed_patches(x[:, :, :5], (2, 3), *rest, epsilon=1e-5)
    with pytest.raises(ValueError, match=r"spatial size \(5, 4\) must be divisible by the block \(2, 2\); pad"):
        to_blocks(jnp.ones((1, 5, 4, 3)), (2, 2))
    with pytest.raises(ValueError, match="features=5 must be divisible by the 4 pixels"):
        from_patches(jnp.ones((2, 2, 5)), (2, 2))
    with pytest.raises(ValueError, match=r"2 spatial axes needs at least 3 axes; got shape \(3, 4\)"):
        split_shape((3, 4), 2)
    with pytest.raises(ValueError, match=r"spatial size \(0, 4\) must not be empty"):
        split_shape((1, 0, 4, 3), 2)

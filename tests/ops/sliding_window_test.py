import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.sliding_window import patch_weights, placements, sliding_window

SIZES = [((16, 12), (8, 4)), ((13, 9), (8, 5)), ((5, 20), (8, 6)), ((7, 9, 5), (4, 4, 8)), ((11,), (4,))]
every_size = pytest.mark.parametrize(("space", "size"), SIZES, ids=str)
every_mode = pytest.mark.parametrize("mode", ["gaussian", "constant"])


def example(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def twin(apply, x, size, overlap, mode):
    """The definition, entry by entry, in NumPy, for one input that is no smaller than a patch."""
    rows = []
    for length, patch in zip(x.shape, size, strict=False):
        row, step = [0], max(1, int(patch * (1 - overlap)))
        while row[-1] + patch < length:
            row.append(min(row[-1] + step, length - patch))
        rows.append(row)
    total, weights = np.zeros(x.shape), np.zeros(x.shape[:-1])
    for start in itertools.product(*rows):
        out = np.asarray(apply(x[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))][None]))[0]
        for place in np.ndindex(*size):
            offsets = [(p - (n - 1) / 2) / (n / 8) for p, n in zip(place, size, strict=True)]
            weight = max(1e-3, math.exp(-sum(o * o for o in offsets) / 2)) if mode == "gaussian" else 1.0
            target = tuple(s + p for s, p in zip(start, place, strict=True))
            total[target] += weight * out[place]
            weights[target] += weight
    return total / weights[..., None]


@every_mode
@every_size
@pytest.mark.parametrize(("overlap", "batch"), [(0.0, 1), (0.5, 3), (0.8, 4)])
def test_a_pointwise_linear_function_passes_through(space, size, mode, overlap, batch):
    x, matrix = example(2, *space, 3), example(3, 4)
    run = functools.partial(sliding_window, lambda patch: patch @ matrix, size=size, mode=mode)
    found = jax.jit(lambda x: run(x, overlap=overlap, batch=batch))(x)
    np.testing.assert_allclose(found, x @ matrix, atol=2e-5)


@every_mode
@pytest.mark.parametrize(("space", "size"), [SIZES[0], SIZES[1], ((7, 9, 5), (4, 4, 5))], ids=str)
def test_equals_the_definition(space, size, mode):
    # A function that depends on the place in the patch, so that weights and placements show.
    ramp = example(1, *size, 1)
    x = example(*space, 2)
    found = sliding_window(lambda patch: patch * ramp, x, size, overlap=0.6, mode=mode, batch=2)
    expected = twin(lambda patch: patch * ramp, np.asarray(x), size, 0.6, mode)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = twin(lambda patch: patch * ramp, np.asarray(x), size, 0.3, mode)
    assert np.abs(other - expected).max() > 0.1


def test_where_a_patch_begins_shows_nowhere():
    # A convolution knows nothing beyond its patch; where others overlap it, Gaussian weights all but hide that.
    conv = nn.Conv(1, (3, 3), padding="SAME", kernel_init=nn.initializers.ones)
    x = jnp.ones((1, 64, 48, 1))
    apply = functools.partial(conv.apply, conv.init(jax.random.key(0), x))
    # Away from the border, where one row of patches has no neighbour to hide its own border.
    exact = np.asarray(apply(x))[0, 8:-8, 8:-8]
    seams = {}
    for mode, overlap in (("gaussian", 0.5), ("constant", 0.5), ("constant", 0.0)):
        found = sliding_window(apply, x, (16, 16), overlap=overlap, mode=mode)
        seams[mode, overlap] = np.abs(np.asarray(found)[0, 8:-8, 8:-8] - exact).max()
    print(seams)
    assert seams["gaussian", 0.5] < 0.025 < 1 < seams["constant", 0.5] < seams["constant", 0.0]


def test_input_smaller_than_a_patch_lies_in_its_middle_among_zeros():
    x = example(2, 3, 4, 1)
    seen = []
    found = sliding_window(lambda patch: seen.append(patch.shape) or jnp.cumsum(patch, 1), x, (6, 7), batch=2)
    assert set(seen) == {(2, 6, 7, 1)}
    np.testing.assert_allclose(found, jnp.cumsum(x, 1), atol=1e-6)
    counted = sliding_window(lambda patch: jnp.cumsum(jnp.ones_like(patch), 1), x, (6, 7))
    np.testing.assert_allclose(counted[0, :, 0, 0], [2, 3, 4], atol=1e-6)


def test_inputs_are_apart_and_any_number_of_axes_may_lead():
    x = example(2, 3, 9, 10, 2)
    run = functools.partial(sliding_window, lambda patch: patch - jnp.mean(patch, (1, 2), keepdims=True), size=(4, 5))
    found = run(x, batch=7)
    assert found.shape == x.shape
    np.testing.assert_allclose(found[1, 2], run(x[1, 2]), atol=1e-6)


def test_program_does_not_grow_with_the_input_and_gradients_are_finite():
    def lines(length):
        run = jax.jit(lambda x: sliding_window(jnp.tanh, x, (8, 8), batch=2))
        return len(run.lower(jax.ShapeDtypeStruct((1, length, 32, 1), jnp.float32)).as_text().splitlines())

    assert lines(64) == lines(256)
    x = example(1, 9, 9, 1)
    gradient = jax.grad(lambda x: jnp.sum(sliding_window(jnp.square, x, (4, 4))))(x)
    np.testing.assert_allclose(gradient, 2 * x, atol=1e-4)


def test_dtype_is_that_of_the_function_and_sums_are_float32():
    x = jnp.ones((1, 33, 8, 1), jnp.bfloat16)
    found = sliding_window(lambda patch: patch * 3, x, (8, 8), overlap=0.9)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 3)


def test_placements_cover_and_weights_stay_away_from_zero():
    assert placements((10, 4), (4, 4), 0.5) == [(0, 0), (2, 0), (4, 0), (6, 0)]
    assert placements((9,), (4,), 0.25) == [(0,), (3,), (5,)]
    assert placements((6,), (2,), 0.99) == [(0,), (1,), (2,), (3,), (4,)]
    weights = patch_weights((16, 16, 16), "gaussian")
    assert weights.min() == 1e-3
    assert weights[7, 8, 7] == weights.max() > 0.85


@pytest.mark.parametrize(
    ("match", "keywords"),
    [
        ("mode='cosine' must be one of", {"mode": "cosine"}),
        (r"overlap=1.0 must lie in \[0, 1\)", {"overlap": 1.0}),
        ("must be positive", {"batch": 0}),
        ("must be positive", {"size": (0, 4)}),
        ("needs at least 4 axes", {"size": (2, 2, 2)}),
        (r"apply must keep the size \[1, 4, 4, features\]", {"apply": lambda patch: patch[:, ::2]}),
    ],
)
def test_what_cannot_be_is_refused(match, keywords):
    arguments = {"apply": jnp.tanh, "x": jnp.ones((8, 8, 1)), "size": (4, 4), **keywords}
    with pytest.raises(ValueError, match=match):
        sliding_window(**arguments)

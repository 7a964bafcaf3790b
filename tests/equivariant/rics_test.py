"""Crop selection: the cyclic version is invariant to the bit, the crops as often as counting says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.rics import (
    RICS,
    canonical_position,
    canonical_roll,
    expected_consistency,
    filter_response,
    fixed_filter,
    select_crop,
)
from jaxlayers.geometry.groups import Translation
from jaxlayers.testing import BadInput, Case, Symmetry


class Classifier(nn.Module):
    """A network that sees every shift: a strided convolution and a dense layer."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(4, (3, 3), strides=2, dtype=self.dtype)(x))
        return nn.Dense(5, dtype=self.dtype)(x.reshape(*x.shape[:-3], -1))


def alone(x):
    """The control: the classifier without selection."""
    return Classifier().apply(jax.jit(Classifier().init)(jax.random.key(0), x), x)


def images(rng, *shape):
    return rng.normal(size=shape)


CASES = (
    Case(
        name="rics_cyclic",
        module=RICS(Classifier(), filter_size=3),
        inputs=lambda rng: (images(rng, 2, 6, 7, 2),),
        symmetries=(Symmetry(Translation(2, cyclic=True), ("image",), control=alone),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"image of shape \(6, 7\) must be", inputs=lambda rng: (images(rng, 6, 7),)),
            BadInput(match=r"filter_size=1 must be at least 2", module=RICS(Classifier(), filter_size=1)),
            BadInput(match=r"a filter of shape \(9, 9\) must fit into images", module=RICS(Classifier(), None, 9)),
        ),
    ),
    Case(
        name="rics_crop",
        module=RICS(Classifier(), crop=(4, 5), filter_size=3),
        inputs=lambda rng: (images(rng, 2, 6, 7, 2),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"crop=\(7, 5\) must be positive and fit", module=RICS(Classifier(), crop=(7, 5))),
            BadInput(
                match=r"a filter of shape \(5, 5\) must fit into crop=\(4, 5\)", module=RICS(Classifier(), (4, 5))
            ),
        ),
    ),
)


def every_shift(x):
    """Return all cyclic shifts of an image `[height, width, channels]`."""
    return np.stack([np.roll(x, shift, axis=(0, 1)) for shift in np.ndindex(x.shape[:2])])


def special_images(rng):
    """Images with ties: of rows, of texture, of single pixels, of everything."""
    texture = np.tile(rng.normal(size=(2, 3, 2)), (3, 3, 1))
    spoilt = texture.copy()
    spoilt[4, 5, 1] += 1e-3
    spots = np.zeros((6, 9, 2))
    spots[1, 2] = spots[4, 6] = 1
    spots[2, 6, 1] = 0.5
    stripes = np.broadcast_to(rng.normal(size=(6, 1, 2)), (6, 9, 2))
    return {
        "noise": rng.normal(size=(6, 9, 2)),
        "periodic texture": texture,
        "spoilt texture": spoilt,
        "two spots": spots,
        "stripes": stripes,
        "constant": np.ones((6, 9, 2)),
        "two grey values": rng.integers(2, size=(6, 9, 2)).astype(float),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cyclic_logits_are_equal_to_the_bit_for_every_shift(rng, dtype):
    module = RICS(Classifier(), filter_size=3)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, 9, 2)))
    run, roll = jax.jit(module.apply), jax.jit(lambda x: canonical_roll(x, fixed_filter(3)))
    control = jax.jit(Classifier().apply)
    for name, image in special_images(rng).items():
        shifts = jnp.asarray(every_shift(image), dtype)
        rolled, logits = np.asarray(roll(shifts)), np.asarray(run(variables, shifts))
        assert np.all(rolled == rolled[:1]), name
        assert np.all(logits == logits[:1]), name
        # One by one as well, as they come at inference.
        assert np.all(np.asarray(run(variables, shifts[17:18])) == np.asarray(run(variables, shifts[:1]))), name
        # Negative control: the classifier alone.
        plain = np.asarray(control({"params": variables["params"]["classifier"]}, shifts), np.float32)
        if name not in ("constant",):
            assert np.abs(plain - plain[:1]).max() > 1e-2, name


def test_without_the_tie_break_shifts_are_told_apart():
    """The control: of two equal spots, the first in reading order is not the same one after a cyclic shift."""
    kernel = fixed_filter(3)
    image = np.zeros((8, 12, 1))
    image[1, 2] = image[5, 8] = 1
    image[3, 5] = 0.3  # tells the two apart, but from far away
    shifts = jnp.asarray(every_shift(image), jnp.float32)
    score = filter_response(shifts, kernel, cyclic=True)
    first = np.asarray(jnp.argmax(score.reshape(len(shifts), -1), axis=-1))
    place = np.stack([first // 12, first % 12], axis=-1)
    naive = np.stack([np.roll(x, -p, axis=(0, 1)) for x, p in zip(np.asarray(shifts), place, strict=True)])
    assert np.any(naive != naive[:1])
    found = np.asarray(canonical_roll(shifts, kernel))
    assert np.all(found == found[:1])


def test_position_equals_a_search_over_all_rolls(rng):
    """The brute-force twin: the largest of (score, pixels of the rolled image) as Python tuples."""
    kernel = fixed_filter(3, seed=4)
    for name, image in special_images(rng).items():
        image = image.astype(np.float32)
        rolls = every_shift(image)  # the roll by s starts at -s
        score = np.asarray(filter_response(jnp.asarray(image), kernel, cyclic=True))
        keys = [(score[-s[0] % 6, -s[1] % 9], *roll.ravel()) for s, roll in zip(np.ndindex(6, 9), rolls, strict=True)]
        best = rolls[max(range(54), key=keys.__getitem__)]
        np.testing.assert_array_equal(canonical_roll(jnp.asarray(image), kernel), best, err_msg=name)
        place = np.asarray(canonical_position(jnp.asarray(image), kernel))
        np.testing.assert_array_equal(np.roll(image, -place, axis=(0, 1)), best)


@pytest.mark.parametrize("cyclic", [False, True])
def test_response_equals_a_loop(rng, cyclic):
    x, kernel = rng.normal(size=(2, 6, 7, 3)), fixed_filter(3, seed=1)
    assert abs(kernel.sum()) < 1e-12
    found = filter_response(jnp.asarray(x, jnp.float32), kernel, cyclic=cyclic)
    plane = x.sum(axis=-1)
    plane = np.pad(plane, ((0, 0), (0, 2), (0, 2)), mode="wrap") if cyclic else plane
    size = (6, 7) if cyclic else (4, 5)
    assert found.shape == (2, *size)
    for row, column in np.ndindex(size):
        expected = np.sum(plane[:, row : row + 3, column : column + 3] * kernel, axis=(1, 2))
        np.testing.assert_allclose(found[:, row, column], expected, atol=1e-5)


def test_crop_equals_a_search_over_all_crops(rng):
    x, kernel = rng.normal(size=(4, 9, 8, 2)).astype(np.float32), fixed_filter(3)
    crops, places = select_crop(jnp.asarray(x), (6, 5), kernel)
    for image, crop, place in zip(x, crops, np.asarray(places), strict=True):
        best = max(
            np.ndindex(4, 4),
            key=lambda p: np.sum(image[p[0] + 1 : p[0] + 4, p[1] + 1 : p[1] + 4].sum(axis=-1) * kernel),
        )
        assert tuple(place) == best
        np.testing.assert_array_equal(crop, image[best[0] : best[0] + 6, best[1] : best[1] + 5])


def test_crop_of_the_whole_image_is_the_image(rng):
    x = jnp.asarray(rng.normal(size=(2, 6, 7, 2)), jnp.float32)
    crops, places = select_crop(x, (6, 7), fixed_filter(3))
    np.testing.assert_array_equal(crops, x)
    np.testing.assert_array_equal(places, 0)


@pytest.mark.parametrize("shift", [(1, 0), (1, 1), (3, 0)])
def test_crops_stay_as_often_as_counting_says(rng, shift):
    """Views of 20 x 20 of white noise, with 9 x 9 places for the crop, moved by some pixels."""
    count = 2000
    scene = jnp.asarray(rng.normal(size=(count, 20 + shift[0], 20 + shift[1], 1)), jnp.float32)
    select = jax.jit(lambda x: select_crop(x, (12, 12), fixed_filter(2))[1])
    first = select(scene[:, :20, :20])
    second = select(scene[:, shift[0] :, shift[1] :]) + jnp.asarray(shift)
    same = float(jnp.mean(jnp.all(first == second, axis=-1)))
    expected = expected_consistency((20, 20), (12, 12), shift)
    print(f"shift {shift}: {same:.3f} measured, {expected:.3f} expected")
    assert abs(same - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_fewer_predictions_change_under_a_pixel_than_with_centre_crops(rng):
    """Realistic shifts: the view moves by a pixel over a larger scene, and the classifier is frozen."""
    count = 500
    scene = jnp.asarray(rng.normal(size=(count, 29, 28, 1)), jnp.float32)
    scene = (scene + jnp.roll(scene, 1, axis=1) + jnp.roll(scene, 1, axis=2)) / 3  # some correlation of neighbours
    module = RICS(Classifier(), crop=(12, 12), filter_size=3)
    variables = module.init(jax.random.key(0), scene[:1])
    own = {"params": variables["params"]["classifier"]}

    def changed(predict):
        predict = jax.jit(predict)
        before, after = (jnp.argmax(predict(x), axis=-1) for x in (scene[:, :28], scene[:, 1:]))
        return float(jnp.mean(before != after))

    rics = changed(functools.partial(module.apply, variables))
    centre = changed(lambda x: Classifier().apply(own, x[:, 8:20, 8:20]))
    print(f"predictions changed by one pixel: {rics:.3f} with crop selection, {centre:.3f} with centre crops")
    # Unselected crops change nearly always, selected ones in 2 of 18 views.
    assert rics < 1.5 * (1 - expected_consistency((28, 28), (12, 12), (1, 0)))
    assert centre > 3 * rics


def test_constant_images_and_nan(rng):
    kernel = fixed_filter(3)
    constant = jnp.ones((1, 6, 7, 2))
    np.testing.assert_array_equal(canonical_roll(constant, kernel), constant)
    np.testing.assert_array_equal(select_crop(constant, (4, 4), kernel)[1], 0)
    x = jnp.asarray(rng.normal(size=(2, 6, 7, 2)), jnp.float32).at[0, 3, 3, 0].set(jnp.nan)
    rolled = canonical_roll(x, kernel)
    assert int(jnp.sum(jnp.isnan(rolled))) == 1
    np.testing.assert_array_equal(rolled[1], canonical_roll(x[1], kernel))


def test_gradient_reaches_the_pixels_of_the_crop_alone(rng):
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 1)), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(select_crop(x, (5, 4), fixed_filter(3))[0] ** 2))(x)
    place = np.asarray(select_crop(x, (5, 4), fixed_filter(3))[1])[0]
    expected = np.zeros((1, 8, 8, 1), np.float32)
    part = np.s_[:, place[0] : place[0] + 5, place[1] : place[1] + 4]
    expected[part] = 2 * np.asarray(x)[part]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    cyclic = jax.grad(lambda x: jnp.sum(canonical_roll(x, fixed_filter(3)) ** 2))(x)
    np.testing.assert_allclose(cyclic, 2 * x, atol=1e-6)


def test_consistency_of_shifts_by_counting():
    assert expected_consistency((28, 28), (12, 12), (1, 0)) == pytest.approx(16 / 18)
    assert expected_consistency((28, 28), (12, 12), (0, 0)) == 1
    assert expected_consistency((28, 28), (12, 12), (17, 0)) == 0
    assert expected_consistency((20, 20), (20, 12), (0, 1)) == pytest.approx(8 / 10)

"""IRL-INR: the drawing turns with the pose exactly, and the latent learns to ignore the pose."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlayers.equivariant.irl_inr import (
    IRLINR,
    Representation,
    canonical_coordinates,
    centre_of_mass,
    implicit_image,
    irl_inr_loss,
    pixel_coordinates,
    weight_shapes,
)
from jaxlayers.testing import BadInput, Case

GOLDEN = Path(__file__).parents[1] / "golden" / "irl_inr_parity.npz"


class Look(nn.Module):
    """A perceptron of all pixels."""

    features: int = 8

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(self.features)(x.reshape(*x.shape[:-3], -1)))


class Maps(nn.Module):
    """An encoder that forgets to pool."""

    @nn.compact
    def __call__(self, x):
        return x


SMALL = IRLINR(Look(), latent_features=3, hidden_features=(5,), hyper_features=(6,), num_frequencies=4)

CASES = (
    Case(
        name="irl_inr",
        module=SMALL,
        inputs=lambda rng: (rng.uniform(size=(2, 5, 6, 2)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"image of shape \(5, 6\) must be", inputs=lambda rng: (rng.uniform(size=(5, 6)),)),
            BadInput(match="widths .* must be positive", module=IRLINR(Look(), latent_features=0)),
            BadInput(match="must return one vector for each; pool", module=IRLINR(Maps())),
        ),
    ),
)


# The drawing --------------------------------------------------------------------------------------------------------


def draw(weights, centre, size=7, translate=True, canonical=canonical_coordinates):
    """A drawing on a square grid, from random constants."""
    frequencies = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
    places = canonical(jnp.asarray(pixel_coordinates((size, size))), centre, translate=translate)
    return implicit_image(places, weights, frequencies, (5,), 2).reshape(size, size, 2)


def random_weights(rng):
    return jnp.asarray(rng.normal(size=sum(rows * (columns + 1) for rows, columns in weight_shapes(4, (5,), 2))))


@pytest.mark.parametrize("translate", [True, False])
def test_turning_the_pose_turns_the_drawing(rng, translate):
    with jax.enable_x64(True):
        weights, centre = random_weights(rng), jnp.array([0.3, -0.1])
        drawn = draw(weights, centre, translate=translate)
        turned = centre
        for k in (1, 2, 3):
            turned = jnp.stack([-turned[1], turned[0]])
            np.testing.assert_allclose(draw(weights, turned, translate=translate), jnp.rot90(drawn, k), atol=1e-12)
        # The control: places that do not turn with the pose.
        still = draw(weights, turned, canonical=lambda places, centre, translate: places - centre)
        base = draw(weights, centre, canonical=lambda places, centre, translate: places - centre)
        assert float(jnp.max(jnp.abs(still - jnp.rot90(base, 3)))) > 0.05


def test_moving_the_centre_along_its_direction_shifts_the_drawing(rng):
    with jax.enable_x64(True):
        weights = random_weights(rng)
        # Pixels of a grid of seven lie a third apart.
        before, after = (draw(weights, jnp.array([x, 0.0])) for x in (1 / 3, 2 / 3))
        np.testing.assert_allclose(before[:, :-1], after[:, 1:], atol=1e-12)


def test_centre_of_mass_turns_and_shifts_with_the_picture(rng):
    with jax.enable_x64(True):
        image = np.zeros((9, 9, 2))
        image[3:6, 2:5] = rng.uniform(size=(3, 3, 2))
        centre = centre_of_mass(jnp.asarray(image))
        turned = centre_of_mass(jnp.asarray(np.rot90(image).copy()))
        np.testing.assert_allclose(turned, jnp.stack([-centre[1], centre[0]]), atol=1e-12)
        shifted = centre_of_mass(jnp.asarray(np.roll(image, (2, -1), (0, 1))))
        np.testing.assert_allclose(shifted, centre + jnp.array([-0.25, -0.5]), atol=1e-12)
        one = np.zeros((9, 9, 1))
        one[1, 6] = 3.0
        np.testing.assert_allclose(centre_of_mass(jnp.asarray(one)), [0.5, 0.75], atol=1e-12)


def test_drawing_equals_brute_force(rng):
    centre = rng.normal(size=2)
    shapes = weight_shapes(2, (4,), 1)
    assert shapes == [(4, 4), (1, 4)]
    weights = rng.normal(size=4 * 4 + 4 + 4 + 1)
    frequencies = rng.normal(size=(2, 2))
    place = rng.normal(size=2)
    angle = np.arctan2(centre[0], centre[1])
    x, y = place - centre
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    waves = [2 * np.pi * (b[0] * x + b[1] * y) for b in frequencies]
    features = [np.cos(wave) for wave in waves] + [np.sin(wave) for wave in waves]
    hidden = [
        max(0.0, sum(weights[4 * row + column] * features[column] for column in range(4)) + weights[20 + row])
        for row in range(4)
    ]
    expected = 1 / (1 + np.exp(-(sum(weights[16 + k] * hidden[k] for k in range(4)) + weights[24])))
    with jax.enable_x64(True):
        places = canonical_coordinates(jnp.asarray(place)[None], jnp.asarray(centre))
        found = implicit_image(places, jnp.asarray(weights), jnp.asarray(frequencies), (4,), 1)
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-12)


def test_parts_equal_those_of_the_reference():
    with np.load(GOLDEN) as arrays:
        golden = {name: jnp.asarray(arrays[name]) for name in arrays.files if name != "provenance"}
    images = jnp.moveaxis(golden["images"], 1, -1)
    centre = centre_of_mass(images)
    np.testing.assert_allclose(centre, golden["centre"], atol=1e-6)
    places = canonical_coordinates(jnp.asarray(pixel_coordinates((9, 9)), jnp.float32), centre)
    # It adds 1e-6 to lengths before it takes the arc cosine, which is steep near one.
    np.testing.assert_allclose(places, golden["coordinates"], atol=3e-4)
    drawn = implicit_image(golden["coordinates"], golden["weights"], golden["frequencies"], (6, 5), 1)
    np.testing.assert_allclose(drawn[..., 0], golden["drawn"], atol=1e-5)


def test_weights_of_another_perceptron_are_refused(untyped):
    with pytest.raises(ValueError, match="7 weights must be the 57 of the layers"):
        implicit_image(jnp.zeros((1, 2)), jnp.zeros(7), jnp.zeros((4, 2)), (5,), 2)
    with pytest.raises(ValueError, match="consistency='angle' is unknown"):
        irl_inr_loss(
            Representation(jnp.ones(2), jnp.ones(2), jnp.ones((2, 2, 1))),
            jnp.ones((2, 2, 1)),
            jnp.ones(2),
            consistency="angle",
        )


# The loss and the latent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consistency", ["cosine", "square"])
def test_loss_and_its_gradient_are_finite_for_pictures_without_a_direction(rng, consistency):
    images = jnp.stack([jnp.zeros((5, 5, 1)), jnp.ones((5, 5, 1)), jnp.zeros((5, 5, 1)).at[2, 2].set(1.0)])
    params = jax.jit(SMALL.init)(jax.random.key(0), images)
    for scale in (0.0, 1.0):  # without weights latent and pose vanish

        def loss(params):
            found = SMALL.apply(params, images)
            return irl_inr_loss(found, images, found.latent[::-1], consistency=consistency)[0]

        value, slope = jax.jit(jax.value_and_grad(loss))(jax.tree.map(lambda x, s=scale: s * x, params))
        assert bool(jnp.isfinite(value))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))


def test_loss_is_the_sum_of_its_parts(rng):
    image = rng.uniform(size=(3, 4, 4, 1))
    z, other, centre, drawn = (rng.normal(size=shape) for shape in ((3, 2), (3, 2), (3, 2), image.shape))
    with jax.enable_x64(True):
        found = Representation(*map(jnp.asarray, (z, centre, drawn)))
        total, parts = irl_inr_loss(found, jnp.asarray(image), jnp.asarray(other), consistency_weight=2.0)
        same, _ = irl_inr_loss(found, jnp.asarray(image), 3 * jnp.asarray(z), pose_weight=0.0)
    cosine = np.sum(z * other, 1) / np.linalg.norm(z, axis=1) / np.linalg.norm(other, axis=1)
    places = pixel_coordinates((4, 4))
    mass = image.reshape(3, -1)
    true = (mass @ places) / mass.sum(1, keepdims=True)
    expected = 15 * np.mean((centre - true) ** 2) + np.mean((drawn - image) ** 2) + 2 * np.mean(1 - cosine)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    np.testing.assert_allclose(same, np.mean((drawn - image) ** 2), rtol=1e-12)
    assert set(parts) == {"pose", "reconstruction", "consistency"}


def shapes(rng, count, size=15):
    """Three kinds of blobs, none of them symmetric, each at a random angle; and the same again at another angle."""
    y, x = np.meshgrid(np.linspace(1, -1, size), np.linspace(-1, 1, size), indexing="ij")
    kinds = (
        ((0.0, 0.4, 6.0), (0.0, -0.2, 14.0)),
        ((0.1, 0.5, 18.0), (-0.4, 0.1, 18.0)),
        ((0.0, 0.35, 5.0), (0.45, 0.0, 25.0)),
    )

    def picture(kind, angle):
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        return sum(0.8 * np.exp(-sharp * ((u - a) ** 2 + (v - b) ** 2)) for a, b, sharp in kinds[kind])

    labels = rng.integers(0, 3, count)
    views = [np.stack([picture(kind, rng.uniform(0, 2 * np.pi)) for kind in labels])[..., None] for _ in range(2)]
    return labels, *(jnp.asarray(view, jnp.float32) for view in views)


def spread(latent, labels):
    """Spread of the latents of one picture over all its angles, relative to that of all pictures."""
    within = np.mean([np.var(latent[labels == kind], axis=0).sum() for kind in range(3)])
    return within / np.var(latent, axis=0).sum()


@pytest.mark.slow
def test_latent_learns_to_ignore_the_angle_and_the_pose_to_follow_it():
    rng = np.random.default_rng(0)
    model = IRLINR(
        Look(64),
        latent_features=4,
        hidden_features=(24,),
        hyper_features=(32,),
        num_frequencies=12,
        frequency_scale=1.0,
    )
    labels, test, again = shapes(rng, 90)
    params = jax.jit(model.init)(jax.random.key(0), test)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, image, moved):
        def loss(params):
            found = model.apply(params, image)
            return irl_inr_loss(found, image, model.apply(params, moved).latent)[0]

        value, slope = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    apply = jax.jit(model.apply)
    before = spread(np.asarray(apply(params, test).latent), labels)
    state = optimizer.init(params)
    for _ in range(600):
        _, image, moved = shapes(rng, 64)
        params, state, _ = step(params, state, image, moved)
    found = apply(params, test)
    after = spread(np.asarray(found.latent), labels)
    assert before > 0.7
    assert after < 0.05
    assert float(jnp.mean(jnp.abs(found.centre - centre_of_mass(test)))) < 0.02
    # The latent still says what to draw, and in which pose it was makes no difference to the upright picture.
    error = jnp.mean((found.image - test) ** 2) / jnp.mean((test - jnp.mean(test)) ** 2)
    assert float(error) < 0.05
    upright, other = (model.apply(params, x, canonical=True).image for x in (test, again))
    assert float(jnp.mean((upright - other) ** 2)) < 0.05 * float(jnp.mean((test - again) ** 2))

"""Assembly: every part's pose turns with it alone, the assembled shape does not move, and the reference agrees."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers.equivariant.se3_assembly import (
    Poses,
    SE3Assembly,
    chamfer_distance,
    correlate,
    embedding_loss,
    frame_loss,
    from_reference,
    part_accuracy,
    place,
    point_loss,
    relative_to,
    rotation_angle,
    rotation_from_vectors,
    rotation_loss,
    se3_assembly,
    translation_loss,
)
from jaxlayers.equivariant.vn_dgcnn import VNDGCNNEncoder
from jaxlayers.geometry.groups import Euclidean, SpecialEuclidean, Symmetric
from jaxlayers.testing import BadInput, Case, Symmetry
from tests.equivariant.vector_neurons_test import reference_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "se3_assembly_parity.npz"
GROUP = SpecialEuclidean(3)


def fragments(rng):
    return (rng.normal(size=(2, 3, 6, 3)) * [1.0, 0.7, 0.4] + rng.normal(size=(2, 3, 1, 3)),)


ENCODER = VNDGCNNEncoder(((4,), (4,)), embed_features=16, num_neighbors=6, negative_slope=0.0)
SMALL = SE3Assembly(ENCODER, hidden_features=(16, 12))

CASES = (
    Case(
        name="se3_assembly",
        module=SMALL,
        # Large enough for the translations to weigh beside the rotations, which no scale changes.
        inputs=lambda rng: (10 * rng.normal(size=(2, 3, 16, 3)) * [1.0, 0.7, 0.4],),
        symmetries=(
            Symmetry(
                GROUP,
                ("points",),
                # The rows of a rotation are vectors in the frame of the part.
                Poses("vectors", "scalar", "points", "scalar", "vectors"),
                control=Euclidean(3),
                # Vectors about a centroid nearly cancel in their mean, whose rounding is that of the larger ones.
                tolerance=5e-5,
                reason="a rotation stays proper, whatever the part; the encoder's mean is small beside its vectors",
            ),
        ),
        leading_axes=True,
        bfloat16_tolerance=0.3,
        bad_inputs=(
            BadInput(match=r"parts of shape \(6, 3\) must be", inputs=lambda rng: (rng.normal(size=(6, 3)),)),
            BadInput(match=r"hidden_features=\(2,\) must not be", module=SMALL.clone(hidden_features=(2,))),
        ),
    ),
)


@functools.cache
def started(correlation=True, stable=True):
    module = SMALL.clone(correlation=correlation, stable=stable)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.ones((2, 3, 6, 3)))
    statistics = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    variables = {"params": variables["params"], "batch_stats": statistics}
    return variables, jax.jit(functools.partial(module.apply, mutable=["intermediates"]))


# The property -------------------------------------------------------------------------------------------------------


def test_each_part_moves_for_itself_and_the_assembled_shape_stays(rng):
    variables, apply = started()
    parts = fragments(rng)[0].astype(np.float32)
    turn = GROUP.sample(rng)
    matrix = np.asarray(GROUP.act(turn, np.eye(3), "vectors")).T
    moved = parts.copy()
    moved[:, 1] = GROUP.act(turn, parts[:, 1], "points")
    before, state = apply(variables, jnp.asarray(parts))
    after, changed = apply(variables, jnp.asarray(moved))
    np.testing.assert_allclose(after.rotations[:, 1], np.asarray(before.rotations[:, 1]) @ matrix.T, atol=5e-5)
    others = np.array([0, 2])
    np.testing.assert_allclose(after.rotations[:, others], before.rotations[:, others], atol=5e-5)
    np.testing.assert_allclose(after.translations, before.translations, atol=1e-5)
    assembled = place(jnp.asarray(parts), before)
    np.testing.assert_allclose(place(jnp.asarray(moved), after), assembled, atol=1e-4)
    # F turns with its part, G does not change.
    (first,), (second,) = state["intermediates"]["vectors"], changed["intermediates"]["vectors"]
    np.testing.assert_allclose(second[:, 1], np.asarray(first[:, 1]) @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(second[:, others], first[:, others], atol=1e-6)
    (first,), (second,) = state["intermediates"]["shapes"], changed["intermediates"]["shapes"]
    np.testing.assert_allclose(second, first, atol=1e-4)
    # The control: poses of one part read as those of another do not undo the motion.
    wrong = place(jnp.asarray(moved), before)
    assert float(jnp.max(jnp.abs(wrong - assembled))) > 0.1


def test_the_published_form_is_badly_conditioned_and_the_stable_one_is_not(rng):
    """Rounding in the rotations, and how nearly parallel the vectors before the head are, with other parts in sight."""
    with jax.enable_x64(True):
        parts = jnp.asarray(fragments(rng)[0], jnp.float32)
        errors, spreads = [], []
        for stable in (True, False):
            encoder = VNDGCNNEncoder(((4,), (4,)), embed_features=4, num_neighbors=6)
            module = SE3Assembly(encoder, hidden_features=(16, 12), stable=stable)
            variables = jax.jit(module.init)(jax.random.key(0), parts)
            apply = jax.jit(functools.partial(module.apply, mutable=["intermediates"], capture_intermediates=True))
            exact, state = apply(
                jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables), parts.astype(jnp.float64)
            )
            errors.append(float(jnp.max(jnp.abs(apply(variables, parts)[0].rotations - exact.rotations))))
            (last,) = state["intermediates"]["gate2"]["__call__"]
            sizes = jnp.linalg.svd(last, compute_uv=False)
            spreads.append(float(jnp.median(sizes[..., 0] / sizes[..., 1])))
    assert errors[1] > 3 * errors[0]
    assert spreads[0] < 10
    assert spreads[1] > 30


def test_a_mirrored_part_gets_a_proper_rotation_and_the_same_shape_features(rng):
    variables, apply = started()
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    _, state = apply(variables, parts)
    after, mirrored = apply(variables, parts * jnp.array([1, 1, -1]))
    np.testing.assert_allclose(jnp.linalg.det(after.rotations), 1, atol=1e-5)
    (first,), (second,) = state["intermediates"]["vectors"], mirrored["intermediates"]["vectors"]
    np.testing.assert_allclose(second, first * jnp.array([1, 1, -1]), atol=1e-5)
    np.testing.assert_allclose(*(x["intermediates"]["shapes"][0] for x in (state, mirrored)), atol=1e-4)


def test_the_stable_form_can_place_a_part_and_its_mirror_image_apart_and_the_published_one_cannot(rng):
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    for stable in (True, False):
        variables, apply = started(stable=stable)
        first, second = (apply(variables, parts * jnp.array([1, 1, sign]))[0].translations for sign in (1, -1))
        assert (float(jnp.max(jnp.abs(first - second))) > 1e-2) == stable


def test_parts_may_come_in_any_order(rng):
    variables, apply = started()
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    order = np.array([2, 0, 1])
    found, expected = apply(variables, parts[:, order])[0], apply(variables, parts)[0]
    for one, other in zip(found, expected, strict=True):
        # Gram-Schmidt divides rounding by the margin of the two vectors.
        np.testing.assert_allclose(one, other[:, order], atol=5e-5)
    points = Symmetric(6).act(Symmetric(6).sample(rng), np.asarray(parts), "points")
    np.testing.assert_allclose(apply(variables, jnp.asarray(points))[0].rotations, expected.rotations, atol=5e-5)


def test_other_parts_count_only_where_they_are_correlated(rng):
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    other = parts.at[:, 2].multiply(jnp.array([0.3, 2.0, 1.0]))
    for correlation in (True, False):
        variables, apply = started(correlation)
        first, second = (apply(variables, x)[0].rotations[:, 0] for x in (parts, other))
        assert (float(jnp.max(jnp.abs(first - second))) > 1e-3) == correlation


def test_padding_changes_nothing_and_gets_no_gradient(rng):
    variables, apply = started()
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    wide = jnp.full((2, 5, 8, 3), 1e3).at[:, np.array([0, 2, 4]), :6].set(parts)
    mask = jnp.zeros((2, 5, 8), bool).at[:, np.array([0, 2, 4]), :6].set(True)
    found, expected = apply(variables, wide, mask=mask)[0], apply(variables, parts)[0]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[:, np.array([0, 2, 4])], other, atol=1e-5)
    np.testing.assert_array_equal(found.rotations[:, 1], np.broadcast_to(np.eye(3), (2, 3, 3)))
    np.testing.assert_array_equal(found.translations[:, 3], 0)

    @jax.jit
    def gradient(wide):
        def total(wide):
            poses = apply(variables, wide, mask=mask)[0]
            return jnp.sum(jnp.where(mask[..., None], jnp.sin(place(wide, poses)), 0))

        return jax.grad(total)(wide)

    slope = gradient(wide)
    np.testing.assert_array_equal(jnp.where(mask[..., None], 0, slope), 0)
    assert 0 < float(jnp.max(jnp.abs(slope))) < np.inf


def test_degenerate_parts_have_finite_poses_and_gradients():
    variables, apply = started()
    line = jnp.outer(jnp.linspace(-1, 1, 6), jnp.array([1.0, 2.0, 3.0]))
    octahedron = jnp.concatenate([jnp.eye(3), -jnp.eye(3)])
    parts = jnp.stack([jnp.stack([jnp.ones((6, 3)), line, octahedron]), jnp.zeros((3, 6, 3))])

    @jax.jit
    def evaluate(parts):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(place(x, apply(variables, x)[0]))))(parts)

    value, gradient = evaluate(parts)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    found = apply(variables, parts.at[0, 1, 2, 0].set(jnp.nan))[0]
    assert np.all(np.isnan(found.rotations[0]))
    assert np.all(np.isfinite(found.rotations[1]))


# The mathematics ----------------------------------------------------------------------------------------------------


def motions(rng, *shape):
    vectors = jnp.asarray(rng.normal(size=(*shape, 2, 3)), jnp.float32)
    rotations = rotation_from_vectors(vectors)[0]
    return rotations, jnp.asarray(rng.normal(size=(*shape, 3)), jnp.float32)


def test_correlation_equals_a_loop_in_numpy(rng):
    with jax.enable_x64(True):
        vectors, shapes = rng.normal(size=(3, 4, 3)), rng.normal(size=(3, 4, 4))
        mask = np.array([True, False, True])
        expected = np.zeros((3, 4, 3))
        for i in (0, 2):
            for j in (0, 2):
                expected[i] += shapes[j] @ vectors[i] / 2
        found = correlate(jnp.asarray(vectors), jnp.asarray(shapes), mask=jnp.asarray(mask))
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_array_equal(correlate(jnp.asarray(vectors), jnp.asarray(shapes), mask=jnp.zeros(3, bool)), 0)


def test_rotation_undoes_the_turn_of_its_vectors(rng):
    vectors = rng.normal(size=(5, 2, 3)).astype(np.float32)
    rotation, _ = rotation_from_vectors(jnp.asarray(vectors))
    g = GROUP.sample(rng)
    turned, _ = rotation_from_vectors(jnp.asarray(GROUP.act(g, vectors, "vectors")))
    matrix = np.asarray(GROUP.act(g, np.eye(3), "vectors")).T
    np.testing.assert_allclose(turned, np.asarray(rotation) @ matrix.T, atol=1e-5)
    aligned = np.asarray(rotation) @ vectors[:, 0, :, None]
    np.testing.assert_allclose(aligned[:, 0, 0], np.linalg.norm(vectors[:, 0], axis=-1), atol=1e-5)
    np.testing.assert_allclose(aligned[:, 1:], 0, atol=1e-5)


def test_relative_poses_do_not_know_where_the_whole_stands(rng):
    rotations, translations = motions(rng, 2, 3)
    parts = jnp.asarray(fragments(rng)[0], jnp.float32)
    poses = Poses(rotations, translations, jnp.mean(parts, axis=-2))
    turn, shift = motions(rng)
    elsewhere = Poses(turn @ rotations, translations @ turn.T + shift, poses.centroids)
    for one, other in zip(relative_to(poses, 1)[:3], relative_to(elsewhere, 1)[:3], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(place(parts, relative_to(poses, 1))[:, 1], parts[:, 1], atol=1e-5)
    assert float(jnp.max(jnp.abs(poses.rotations - elsewhere.rotations))) > 0.1


def test_angles_are_those_of_arccos_with_finite_gradients(rng):
    with np.load(GOLDEN) as golden:
        first, second, angles = (jnp.asarray(golden[name]) for name in ("first", "second", "angles"))
    np.testing.assert_allclose(rotation_angle(first, second), angles, atol=1e-5)
    half = jnp.diag(jnp.array([1.0, -1.0, -1.0]))
    same = jnp.stack([jnp.eye(3), half, jnp.zeros((3, 3))])
    np.testing.assert_allclose(rotation_angle(jnp.eye(3)[None].repeat(3, 0), same)[:2], [0, np.pi], atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(rotation_angle(jnp.eye(3)[None].repeat(3, 0), x)))(same)
    assert np.all(np.isfinite(gradient))


def test_losses_equal_loops_in_numpy(rng):
    first, second = rng.normal(size=(2, 3, 5, 3)), rng.normal(size=(2, 3, 4, 3))
    masks = rng.random((2, 3, 5)) < 0.7, rng.random((2, 3, 4)) < 0.7
    masks[0][..., 0], masks[1][..., 0] = True, True
    masks[0][1, 2], masks[1][1, 2] = False, False
    expected = np.zeros((2, 3))
    for index in np.ndindex(2, 3):
        a, b = first[index][masks[0][index]], second[index][masks[1][index]]
        if len(a):
            squared = np.sum((a[:, None] - b) ** 2, axis=-1)
            expected[index] = squared.min(axis=0).mean() + squared.min(axis=1).mean()
    a, b = jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)
    found = chamfer_distance(a, b, masks=(jnp.asarray(masks[0]), jnp.asarray(masks[1])))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(chamfer_distance(a, a), 0, atol=1e-6)
    mask = jnp.asarray(masks[0])
    shifted = a + jnp.array([0.0, 0.0, 0.2])
    np.testing.assert_allclose(point_loss(a, shifted, mask=mask), 0.04, atol=1e-6)
    np.testing.assert_allclose(point_loss(a, shifted), 0.04, atol=1e-6)
    # Two of three parts are in place.
    moved = a.at[:, 0].add(1.0)
    np.testing.assert_allclose(part_accuracy(moved, a), 2 / 3, atol=1e-6)
    np.testing.assert_allclose(part_accuracy(moved, a, mask=mask), [2 / 3, 1 / 2], atol=1e-6)
    rotations, translations = motions(rng, 2, 3)
    present = jnp.any(mask, axis=-1)
    spoilt = translations.at[1, 2].set(9.0)
    np.testing.assert_array_equal(translation_loss(spoilt, translations, mask=present), 0)
    np.testing.assert_allclose(rotation_loss(rotations, rotations), 0, atol=1e-3)
    np.testing.assert_allclose(frame_loss(2 * rotations[..., :2, :], rotations), 2, atol=1e-5)
    np.testing.assert_allclose(frame_loss(jnp.zeros((2, 3, 2, 3)), rotations, mask=present), 2, atol=1e-5)
    vectors = jnp.ones((2, 3, 4, 3))
    np.testing.assert_allclose(embedding_loss(vectors, jnp.zeros((2, 4, 3)), mask=present), [3, 2], atol=1e-6)


# The reference code -------------------------------------------------------------------------------------------------


def test_features_and_poses_equal_those_of_the_reference():
    with np.load(GOLDEN) as golden:
        stored = dict(golden)
    parts = jnp.asarray(stored["parts"])
    model = se3_assembly(correlation=False, stable=False)
    tensors = reference_weights(json.loads(str(stored["shapes"])))
    variables = from_reference(tensors, jax.eval_shape(model.init, jax.random.key(0), parts))
    poses, state = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables, parts)
    (vectors,), (shapes,) = state["intermediates"]["vectors"], state["intermediates"]["shapes"]
    np.testing.assert_allclose(vectors, stored["vectors"], atol=1e-5)
    np.testing.assert_allclose(shapes[..., :6, :6], stored["shapes_corner"], atol=1e-5)
    # The reference sums where this takes the mean.
    np.testing.assert_allclose(3 * correlate(vectors, shapes), stored["correlated"], atol=1e-4)
    np.testing.assert_allclose(poses.rotations, stored["rotations"], atol=1e-4)
    np.testing.assert_allclose(poses.translations, stored["translations"], atol=1e-5)

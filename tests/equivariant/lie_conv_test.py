"""Lie group convolution: exact for the group, in the limit of samples where it lifts to several, as the reference."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlayers.equivariant.lie_conv import (
    GROUPS,
    STABILISED,
    Elements,
    LieBlock,
    LieConv,
    LieResNet,
    ball_radius,
    from_reference,
    group_distance,
    lift,
    relative_coordinates,
)
from jaxlayers.geometry.groups import Cyclic, Rotation, Scale, SpecialEuclidean, Symmetric, Translation
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant, assert_invariant

GOLDEN = Path(__file__).parents[1] / "golden" / "lie_conv_parity.npz"
DIMENSION = {"trivial": 2, "T(d)": 3, "SO(2)": 2, "R x SO(2)": 2, "SE(2)": 2, "SO(3)": 3, "SE(3)": 3}


#: How well code is optimised is not what is checked.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(fast, static_argnames=("group", "samples"))
def lifted_pairs(points, key, group, samples):
    elements = lift(points, group, samples=samples, key=key)
    return elements, relative_coordinates(elements, group)


pairs_of = functools.partial(fast, static_argnums=1)(relative_coordinates)


def start(module, *inputs):
    return fast(module.init)(jax.random.key(0, impl="rbg"), *inputs)


def cloud(rng, d=2, n=5, channels=3):
    return rng.normal(size=(2, n, d)) + 0.3, rng.normal(size=(2, n, channels))


def lifted(rng, coordinates=3):
    return rng.normal(size=(2, 5, 5, coordinates)), rng.normal(size=(2, 5, 4))


def running(pairs, values):
    return jnp.cumsum(values, axis=-2)


def first_point(points, values):
    return points[..., 0, :]


SMALL = {"features": (16, 16, 20), "kernel_features": (8, 4), "num_classes": 2}
SMALL_CONV = LieConv(features=5, group="SE(2)", radius=2.5, kernel_features=(8, 4))

CASES = (
    Case(
        name="lie_conv",
        within="lie_resnet_se2",
        module=LieConv(features=6, group="SE(2)", neighbours=3, kernel_features=(8, 4)),
        inputs=lifted,
        symmetries=(Symmetry(Symmetric(5), ("edges", "set"), "set", control=running),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"group='SE\(4\)' is unknown; use", module=LieConv(features=6, group="SE(4)")),
            BadInput(match=r"features=0 and kernel_features=\(8,\)", module=LieConv(features=0, kernel_features=(8,))),
            BadInput(match=r"alpha=2.0 must lie in \[0, 1\]", module=LieConv(features=6, alpha=2.0)),
            BadInput(match=r"radius=-1.0 must not be negative", module=LieConv(features=6, radius=-1.0)),
            BadInput(match=r"must end in the coordinates of group='SE\(3\)'", module=LieConv(features=6)),
            BadInput(
                match=r"pairs of shape \(2, 4, 5, 3\) must be",
                inputs=lambda rng: (rng.normal(size=(2, 4, 5, 3)), rng.normal(size=(2, 5, 4))),
            ),
        ),
    ),
    Case(
        name="lie_block",
        within="lie_resnet_se2",
        module=LieBlock(features=6, hidden_features=4, conv=SMALL_CONV),
        inputs=lifted,
        symmetries=(Symmetry(Symmetric(5), ("edges", "set"), "set", control=running),),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"features=3 must be at least the 4 of the input",
                module=LieBlock(features=3, hidden_features=2, conv=SMALL_CONV),
            ),
        ),
    ),
    Case(
        name="lie_resnet_se2",
        module=LieResNet(group="SE(2)", samples=4, radius=(3.0, 4.0), **SMALL),
        inputs=cloud,
        symmetries=(
            Symmetry(Translation(2), ("points", "set"), control=first_point),
            Symmetry(Cyclic(4), ("points", "set"), control=Scale(), reason="exact for the angles of the samples"),
            Symmetry(Symmetric(5), ("points", "set"), control=first_point),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"features=\(6, 8\) must be multiples of 4", module=LieResNet(features=(6, 8))),
            BadInput(match=r"radius=\(1.0,\) must be one number or 2", module=LieResNet(radius=(1.0,), **SMALL)),
            BadInput(
                match=r"points of shape \(2, 5, 3\) must be \[\*batch, n, 2\] for group='SE\(2\)'",
                inputs=functools.partial(cloud, d=3),
            ),
            BadInput(
                match=r"values \(2, 4, 3\) and mask None must agree",
                inputs=lambda rng: (rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 4, 3))),
            ),
        ),
    ),
    Case(
        name="lie_resnet_r_so2",
        module=LieResNet(group="R x SO(2)", **SMALL),
        inputs=cloud,
        symmetries=(
            Symmetry(Rotation(2), ("points", "set"), control=Translation(2)),
            Symmetry(Scale(), ("points", "set"), control=Translation(2)),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"samples=2 must be 1 for group='SO\(2\)'", module=LieResNet(group="SO(2)", samples=2)),
        ),
    ),
    Case(
        name="lie_resnet_so2",
        within="lie_resnet_se2",
        module=LieResNet(group="SO(2)", pool=False, **SMALL),
        inputs=cloud,
        symmetries=(Symmetry(Rotation(2), ("points", "set"), control=Scale()),),
        leading_axes=True,
        bad_inputs=(BadInput(match=r"samples=0 must be at least 1", module=LieResNet(group="SO(2)", samples=0)),),
    ),
    Case(
        name="lie_resnet_t3",
        within="lie_resnet_se2",
        module=LieResNet(group="T(d)", pool=False, neighbours=3, **SMALL),
        inputs=functools.partial(cloud, d=3),
        symmetries=(
            Symmetry(Translation(3), ("points", "set"), "set", control=Rotation(3)),
            Symmetry(Symmetric(5), ("points", "set"), "set", control=running),
        ),
        leading_axes=True,
        bad_inputs=(BadInput(match=r"group='T\(3\)' is unknown", module=LieResNet(group="T(3)")),),
    ),
    Case(
        name="lie_resnet_se3",
        module=LieResNet(group="SE(3)", samples=4, **SMALL),
        inputs=functools.partial(cloud, d=3, n=4),
        symmetries=(Symmetry(Translation(3), ("points", "set"), control=SpecialEuclidean(3)),),
        leading_axes=True,
        bad_inputs=(BadInput(match=r"samples=5 of group='SE\(3\)' must be one of", module=LieResNet(samples=5)),),
    ),
)


# Elements and their coordinates -------------------------------------------------------------------------------------


def matrices(elements, group, index=0):
    """Elements as matrices that multiply, in NumPy."""
    found = []
    some = elements.linear if elements.linear is not None else elements.translation
    for m in range(some.shape[-2 if elements.linear is None else -3]):
        d = some.shape[-1]
        matrix = np.eye(d + 1)
        if elements.linear is not None:
            matrix[:d, :d] = elements.linear[index, m]
        if elements.translation is not None:
            matrix[:d, d] = elements.translation[index, m]
        found.append(matrix)
    return found


def coordinates(matrix, group):
    """The coordinates of the logarithm, by SciPy."""
    d = len(matrix) - 1
    a = np.real(scipy.linalg.logm(matrix))
    turn = [a[1, 0]] if d == 2 else [a[2, 1], a[0, 2], a[1, 0]]
    return {
        "T(d)": a[:d, d],
        "SO(2)": turn,
        "SO(3)": turn,
        "R x SO(2)": [*turn, a[0, 0]],
        "SE(2)": [*turn, *a[:d, d]],
        "SE(3)": [*turn, *a[:d, d]],
    }[group]


def moved(elements, group, rng):
    """Multiply all elements from the left by one of the group."""
    d = DIMENSION[group]
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    turn[:, 0] *= np.linalg.det(turn)
    turn = turn * (1.7 if group == "R x SO(2)" else 1.0)
    linear, translation = elements.linear, elements.translation
    if linear is not None:
        linear = jnp.einsum("ij,...jk->...ik", turn, linear)
        translation = None if translation is None else translation @ turn.T
    if translation is not None:
        translation = translation + rng.normal(size=d)
    return Elements(linear, translation, elements.orbit)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "trivial"])
def test_coordinates_are_the_logarithm_and_do_not_see_the_group(group, rng):
    with jax.enable_x64(True):
        points = jnp.asarray(cloud(rng, DIMENSION[group], n=4)[0])
        samples = 3 if group in STABILISED else 1
        elements, pairs = lifted_pairs(points, jax.random.key(0) if samples > 1 else None, group, samples)
        # The first element carries the origin to the point.
        d = DIMENSION[group]
        origin = np.zeros(d) if "SE" in group or group == "T(d)" else np.eye(d)[0]
        places = [m[:d, :d] @ origin + m[:d, d] for m in matrices(elements, group)]
        expected = np.repeat(points[0], samples, axis=0)
        if elements.orbit is not None:
            expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(places, expected, atol=1e-12)
        listed = matrices(elements, group)
        for u in range(len(listed)):
            for v in range(u % 3, len(listed), 3):
                step = coordinates(np.linalg.inv(listed[v]) @ listed[u], group)
                np.testing.assert_allclose(pairs[0, u, v, : len(step)], step, atol=1e-10)
        shifted = pairs_of(moved(elements, group, rng), group)
        np.testing.assert_allclose(shifted, pairs, atol=1e-10)
        if group in ("SE(2)", "SE(3)"):
            # The control: multiplied from the right they change.
            right = jnp.einsum("...ij,jk->...ik", elements.linear, scipy.linalg.expm(np.eye(d, k=1) - np.eye(d, k=-1)))
            other = pairs_of(Elements(right, elements.translation + 1, None), group)
            assert float(jnp.max(jnp.abs(other - pairs))) > 1e-2
        # The distance is that of the inverse step.
        distance = group_distance(pairs, group)
        np.testing.assert_allclose(distance, jnp.swapaxes(distance, -1, -2), atol=1e-10)
    assert lifted_pairs(jnp.ones((2, d)), None, group, 1)[1].dtype == jnp.float32


@pytest.mark.parametrize(
    "group",
    [pytest.param(name, marks=[] if name in ("SO(2)", "R x SO(2)", "SE(3)") else pytest.mark.slow) for name in GROUPS],
)
def test_degenerate_clouds_give_finite_values_and_gradients(group):
    d = DIMENSION[group]
    line = np.outer([-1.0, 0.0, 0.5, 2.0], np.eye(d)[0])
    clouds = jnp.asarray(np.stack([np.zeros((4, d)), np.ones((4, d)), line, -line]), jnp.float32)
    samples = 4 if group in STABILISED else 1
    module = LieResNet(group=group, samples=samples, **SMALL)
    values = jnp.ones((4, 4, 1))
    variables = start(module, clouds, values)
    value, gradient = fast(jax.value_and_grad(lambda x: jnp.sum(module.apply(variables, x, values))))(clouds)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    "group",
    [pytest.param(name, marks=[] if name in ("SO(2)", "SO(3)", "T(d)") else pytest.mark.slow) for name in GROUPS],
)
def test_nan_in_a_point_comes_out_for_its_cloud_only(group, rng):
    points, values = (jnp.asarray(x, jnp.float32) for x in cloud(rng, DIMENSION[group]))
    module = LieResNet(group=group, radius=1.0, neighbours=5, **{**SMALL, "features": (16, 16)})
    variables = start(module, points, values)
    found = fast(module.apply)(variables, points.at[0, 2, 0].set(jnp.nan), values)
    assert np.all(np.isnan(found[0]))
    assert np.all(np.isfinite(found[1]))


@pytest.mark.parametrize("group", ["SO(2)", "R x SO(2)"])
def test_a_point_at_the_centre_keeps_the_symmetry(group, rng):
    points, values = (jnp.asarray(x, jnp.float32) for x in cloud(rng))
    points = points.at[:, 2].set(0)
    module = LieResNet(group=group, **SMALL)
    variables = start(module, points, values)
    call = fast(functools.partial(module.apply, variables))
    points, values = np.asarray(points), np.asarray(values)
    assert_invariant(call, Rotation(2), points, values, representations=["points", "set"])
    if group == "R x SO(2)":
        assert_invariant(call, Scale(), points, values, representations=["points", "set"])


# The layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [pytest.param("radius", marks=pytest.mark.slow), "neighbours", "mask"])
def test_convolution_equals_a_loop_over_pairs_in_numpy(bound, rng):
    points, values = cloud(rng, d=3, n=4)
    mask = np.array([[True] * 4, [True, True, False, True]]).repeat(2, axis=-1)
    with jax.enable_x64(True):
        elements, pairs = lifted_pairs(jnp.asarray(points), jax.random.key(1), "SE(3)", 2)
        values = jnp.asarray(np.repeat(values, 2, axis=-2))
        radius = 2.5 if bound == "radius" else None
        neighbours = 3 if bound == "neighbours" else None
        module = LieConv(5, "SE(3)", radius, neighbours, kernel_features=(7, 3), param_dtype=jnp.float64)
        variables = start(module, pairs, values)
        used = mask if bound == "mask" else np.ones_like(mask)
        found = fast(module.apply)(variables, pairs, values, mask=jnp.asarray(used))
    params = jax.tree.map(np.asarray, variables["params"])

    def kernel(step):
        for layer in range(2):
            step = step @ params[f"kernel_{layer}"]["kernel"] + params[f"kernel_{layer}"]["bias"]
            step = step / (1 + np.exp(-step))
        # k = W phi, as a matrix [features, out].
        return np.einsum("b,cbo->co", step, params["out"]["kernel"].reshape(3, 3, 5))

    sizes = set()
    for index in (1,):
        listed = matrices(elements, "SE(3)", index)
        for u in range(0, 8, 3):
            steps = [coordinates(np.linalg.inv(v) @ listed[u], "SE(3)") for v in listed]
            distances = np.array([0.2 * np.linalg.norm(s[:3]) + 0.8 * np.linalg.norm(s[3:]) for s in steps])
            near = [v for v in np.argsort(distances) if used[index, v]][:neighbours]
            near = [v for v in near if radius is None or distances[v] <= radius]
            sizes.add(len(near))
            expected = np.mean([np.asarray(values[index, v]) @ kernel(steps[v]) for v in near], axis=0)
            expected = (expected + params["out"]["bias"]) * used[index, u]
            np.testing.assert_allclose(found[index, u], expected, atol=1e-9)
    assert sizes <= {3} if neighbours else max(sizes) > 3


@pytest.mark.slow
def test_bounds_that_hold_everything_change_nothing(rng):
    pairs, values = (jnp.asarray(x, jnp.float32) for x in lifted(rng))
    free = LieConv(3, "SE(2)")
    variables = start(free, pairs, values)
    expected = free.apply(variables, pairs, values)
    for bounds in ({"radius": 100.0}, {"neighbours": 5}, {"neighbours": 9}):
        np.testing.assert_allclose(LieConv(3, "SE(2)", **bounds).apply(variables, pairs, values), expected, atol=1e-5)
    close = LieConv(3, "SE(2)", neighbours=2).apply(variables, pairs, values)
    assert float(jnp.max(jnp.abs(close - expected))) > 1e-2


def test_a_constant_kernel_is_the_mean_of_the_neighbourhood(rng):
    pairs, values = (jnp.asarray(x, jnp.float32) for x in lifted(rng))
    module = LieConv(4, "SE(2)", kernel_features=(1,), activation_fn=lambda x: x)
    params = {
        "kernel_0": {"kernel": jnp.zeros((3, 1)), "bias": jnp.ones(1)},
        "out": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
    }
    found = module.apply({"params": params}, pairs, values)
    np.testing.assert_allclose(found, jnp.broadcast_to(values.mean(1, keepdims=True), values.shape), atol=1e-6)


found_radius = functools.partial(fast, static_argnums=(1, 2), static_argnames=("samples",))(ball_radius)


def test_radius_of_a_fill_holds_that_share_of_pairs(rng):
    points = jnp.asarray(cloud(rng, n=30)[0], jnp.float32)
    radius = found_radius(points, "SE(2)", 0.25, samples=2)
    distances = group_distance(lifted_pairs(points, None, "SE(2)", 2)[1], "SE(2)")
    assert abs(float(jnp.mean(distances <= radius)) - 0.25) < 0.01
    mask = jnp.arange(30) < 20
    part = found_radius(points, "SE(2)", 0.25, mask=jnp.broadcast_to(mask, (2, 30)))
    np.testing.assert_allclose(part, found_radius(points[:, :20], "SE(2)", 0.25), rtol=1e-6)
    with pytest.raises(ValueError, match=r"fill=0.0 must lie in \(0, 1\]"):
        ball_radius(points, "SE(2)", 0.0)


# The network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "pool"), [("SE(2)", True), ("T(d)", False)])
def test_padding_is_not_seen(group, pool, rng):
    points, values = (jnp.asarray(x, jnp.float32) for x in cloud(rng))
    small = {**SMALL, "features": (16, 16)}
    module = LieResNet(group=group, samples=2 if group == "SE(2)" else 1, pool=pool, neighbours=4, **small)
    variables = start(module, points, values)
    mask = jnp.arange(8) < 5
    wide = [jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=np.nan) for x in (points, values)]
    call = fast(module.apply)
    found = call(variables, *wide, mask=jnp.broadcast_to(mask, (2, 8)))
    expected = call(variables, points, values)
    np.testing.assert_allclose(found if pool else found[:, :5], expected, atol=1e-5)
    if not pool:
        assert not np.any(found[:, 5:])
    filled = [jnp.nan_to_num(x, nan=0.7) for x in wide]
    seen = call(variables, *filled)
    assert float(jnp.max(jnp.abs((seen if pool else seen[:, :5]) - expected))) > 1e-3
    empty = call(variables, *wide, mask=jnp.zeros((2, 8), bool))
    assert np.all(np.isfinite(empty))
    gradient = fast(
        jax.grad(lambda x: jnp.sum(module.apply(variables, x, wide[1], mask=jnp.broadcast_to(mask, (2, 8)))))
    )
    assert np.all(np.isfinite(gradient(wide[0])))


def errors(group, samples, draws, *, drawn):
    """Root mean square change of the output over rotations, relative to the largest output."""
    d = DIMENSION[group]
    points, values = (jnp.asarray(x, jnp.float32) for x in cloud(np.random.default_rng(3), d, n=3, channels=1))
    module = LieResNet(group=group, samples=samples, norm=None, **{**SMALL, "features": (16, 16)})
    # The parameters are those of any number of samples.
    variables = start(module.clone(samples=1), points, values)
    turns = np.linalg.qr(np.random.default_rng(4).normal(size=(draws, d, d)))[0]
    turns[:, :, 0] *= np.linalg.det(turns)[:, None]

    def call(arguments):
        turn, key = arguments
        rngs = {"lift": key} if drawn else None
        return module.apply(variables, points @ turn.T, values, deterministic=not drawn, rngs=rngs)

    keys = jax.random.split(jax.random.key(1), draws)
    out = np.asarray(fast(functools.partial(jax.lax.map, call))((jnp.asarray(turns, jnp.float32), keys)))
    return float(np.sqrt(np.mean(np.var(out, axis=0))) / np.max(np.abs(out.mean(axis=0))))


def test_error_of_drawn_elements_falls_as_the_root_of_their_number():
    counts = (2, 8, 32)
    found = [errors("SE(3)", count, 24, drawn=True) for count in counts]
    slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
    assert -0.75 < slope < -0.3, (slope, found)


@pytest.mark.parametrize(
    ("group", "counts"),
    [
        ("SE(2)", (1, 3, 9)),
        pytest.param("SO(3)", (1, 3, 9), marks=pytest.mark.slow),
        pytest.param("SE(3)", (1, 12, 60), marks=pytest.mark.slow),
    ],
)
def test_error_of_fixed_elements_falls_faster(group, counts):
    found = [errors(group, count, 12, drawn=False) for count in counts]
    assert found[1] < 0.5 * found[0], found
    assert found[2] < 0.2 * found[0], found


@pytest.mark.parametrize("precise", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "float64"])
def test_rotations_of_the_cube_are_exact_with_its_samples(precise, rng):
    with jax.enable_x64(precise):
        dtype, tolerance = (np.float64, 1e-10) if precise else (np.float32, 1e-5)
        points, values = (jnp.asarray(x, dtype) for x in cloud(rng, d=3, n=3))
        module = LieResNet(group="SE(3)", samples=24, **{**SMALL, "features": (16, 16)})
        variables = start(module, points, values)
        call = fast(module.apply)
        expected = call(variables, points, values)
        turns = lift(jnp.zeros((1, 3), dtype), "SE(3)", samples=24).linear
        scale = float(jnp.max(jnp.abs(expected)))
        for turn in turns[1::5]:
            found = call(variables, points @ turn.T + 0.5, values)
            np.testing.assert_allclose(found, expected, atol=tolerance * scale)
        other = call(variables, points @ np.asarray(scipy.linalg.expm(np.eye(3, k=1) - np.eye(3, k=-1)), dtype), values)
        assert float(jnp.max(jnp.abs(other - expected))) > 100 * tolerance * scale


def test_forces_of_an_invariant_energy_turn_with_the_cloud(rng):
    points, values = (jnp.asarray(x, jnp.float32) for x in cloud(rng))
    module = LieResNet(group="SO(2)", **SMALL)
    variables = start(module, points, values)
    forces = fast(jax.grad(lambda x, f: jnp.sum(module.apply(variables, x, f)[..., 0])))
    points, values = np.asarray(points), np.asarray(values)
    claim = functools.partial(assert_equivariant, forces, Rotation(2), points, values, output="vectors")
    claim(representations=["points", "set"])
    with pytest.raises(AssertionError):
        assert_equivariant(forces, Scale(), points, values, representations=["points", "set"], output="vectors")


# The reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["SE(3)", "T(d)", "SO(2)"])
def test_network_equals_the_reference(group):
    with np.load(GOLDEN) as arrays:
        stored = {name.removeprefix(f"{group}/"): x for name, x in arrays.items() if name.startswith(f"{group}/")}
    params = from_reference({name.removeprefix("weights/"): x for name, x in stored.items() if "weights/" in name})
    samples = 2 if group == "SE(3)" else 1
    module = LieResNet(2, group, (8, 8, 8), samples, norm=None)
    inputs = [jnp.asarray(stored[name]) for name in ("points", "values")]
    mask = jnp.asarray(stored["mask"])
    if group != "SE(3)":
        pairs = relative_coordinates(lift(inputs[0], group), group)
        # Its angles go up to pi from both sides, as ours but for half turns.
        np.testing.assert_allclose(pairs, stored["pairs"], atol=2e-6)
        np.testing.assert_allclose(module.apply({"params": params}, *inputs, mask=mask), stored["output"], atol=1e-5)
        return
    # It drew its elements: the blocks are given the coordinates that it had.
    pairs, valid = jnp.asarray(stored["pairs"]), jnp.asarray(stored["lifted_mask"])
    x = jnp.asarray(stored["lifted_values"]) @ params["embed"]["kernel"] + params["embed"]["bias"]
    for index in range(2):
        block = LieBlock(8, 2, LieConv(2, group), norm=None)
        x = block.apply({"params": params[f"blocks_{index}"]}, pairs, x, mask=valid)
    x = jax.nn.silu(x) @ params["head"]["kernel"] + params["head"]["bias"]
    found = jnp.sum(jnp.where(valid[..., None], x, 0), axis=1) / jnp.sum(valid, axis=1)[:, None]
    np.testing.assert_allclose(found, stored["output"], atol=1e-5)


def test_unfitting_state_dict_is_refused():
    with np.load(GOLDEN) as arrays:
        weights = {k.removeprefix("T(d)/weights/"): x for k, x in arrays.items() if k.startswith("T(d)/weights/")}
    with pytest.raises(ValueError, match=r"net.1.conv.linear.bias must be zero"):
        from_reference({**weights, "net.1.conv.linear.bias": np.ones(2)})
    del weights["net.1.net.2.module.weight"]
    with pytest.raises(ValueError, match=r"must hold net.1.net.2.module.weight"):
        from_reference(weights)

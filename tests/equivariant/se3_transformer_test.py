"""SE(3)-Transformer: exact after every iteration, the same in chunks and on split points, lean in memory."""

import functools
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.equivariant.fibers import Edges, edges_of, rotate_fiber
from jaxlayers.equivariant.se3_transformer import (
    Moved,
    SE3Attention,
    SE3Classifier,
    SE3Particles,
    SE3Transformer,
)
from jaxlayers.equivariant.tensor_field import (
    AttentiveSelfInteraction,
    FiberNormNonlinearity,
    TensorFieldConv,
    radial_kernel_from_reference,
)
from jaxlayers.geometry.groups import Euclidean, Orthogonal, Product, Rotation, SpecialEuclidean, Symmetric
from jaxlayers.geometry.harmonics import clebsch_gordan, spherical_harmonics
from jaxlayers.ops.neighbours import Neighbours, everyone, k_nearest
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant

GOLDEN = Path(__file__).parents[1] / "golden" / "se3_transformer_parity.npz"
FIBER = {0: "scalar", 1: "vectors"}
EDGES = Edges(neighbours=None, vectors="vectors", directions="vectors", features=None, basis=None)
CHIRAL = "kernels of odd k + l + J make axial features of polar ones"


def fiber(rng, channels=(2, 2), batch=(2, 5)):
    return {degree: rng.normal(size=(*batch, count, 2 * degree + 1)) for degree, count in enumerate(channels) if count}


def random_edges(rng, batch=(2, 5), k=3):
    indices = rng.integers(0, batch[-1], size=(*batch, k))
    mask = rng.random((*batch, k)) < 0.8
    vectors = np.where(mask[..., None], rng.normal(size=(*batch, k, 3)), 0)
    return Edges(Neighbours(indices, mask), vectors, vectors)


def clouds(rng, batch=(2, 5)):
    return rng.normal(size=(*batch, 3))


def particles(rng):
    return clouds(rng), clouds(rng), rng.choice([-1.0, 1.0], size=(2, 5, 1))


def flattened(features):
    """The control: vectors mixed as if they were one row of numbers."""
    return {degree: jnp.cumsum(jnp.asarray(x), axis=-1) for degree, x in features.items()}


TINY = SE3Transformer(features=(4, 4), depth=1, iterations=2, num_heads=2, bottleneck=2)

CASES = (
    Case(
        name="attentive_self_interaction",
        module=AttentiveSelfInteraction((3, 2)),
        inputs=lambda rng: (fiber(rng),),
        symmetries=(Symmetry(Orthogonal(3), (FIBER,), FIBER, control=flattened),),
        leading_axes=True,
        within="se3_classifier",
        bad_inputs=(
            BadInput(match=r"asks for degree 2, which the input", module=AttentiveSelfInteraction((3, 2, 1))),
            BadInput(match=r"features=\(\) must be the channels", module=AttentiveSelfInteraction(())),
        ),
    ),
    Case(
        name="se3_attention",
        module=SE3Attention((4, 4), num_heads=2, bottleneck=2, relative="concatenate", hidden_features=8),
        inputs=lambda rng: (fiber(rng), random_edges(rng)),
        symmetries=(Symmetry(Rotation(3), (FIBER, EDGES), FIBER, control=Orthogonal(3), reason=CHIRAL),),
        leading_axes=True,
        within="se3_transformer",
        bad_inputs=(
            BadInput(match=r"relative='yes' is unknown", module=SE3Attention((4, 4), relative="yes")),
            BadInput(match=r"= \(1, 1\) must be divisible by num_heads=2", module=SE3Attention((4, 4), num_heads=2)),
            BadInput(match=r"bottleneck=0 and num_heads=1 must be positive", module=SE3Attention((4, 4), bottleneck=0)),
            BadInput(match=r"features=\(0, 0, 4\) must share a degree", module=SE3Attention((0, 0, 4))),
        ),
    ),
    Case(
        name="se3_transformer",
        module=TINY.clone(out_features=(2, 1), chunk=2, num_neighbours=3),
        inputs=lambda rng: (clouds(rng), fiber(rng)),
        symmetries=(
            Symmetry(
                SpecialEuclidean(3), ("points", FIBER), Moved("points", FIBER), control=Euclidean(3), reason=CHIRAL
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"positions of shape \(2, 5, 2\)", inputs=lambda rng: (rng.normal(size=(2, 5, 2)),)),
            BadInput(match=r"depth=0 and iterations=1 must be positive", module=SE3Transformer(depth=0)),
            BadInput(match=r"iterations=2 needs vectors", module=SE3Transformer((8,), iterations=2)),
            BadInput(match=r"num_neighbours=0 must be positive", module=TINY.clone(num_neighbours=0)),
            BadInput(
                match=r"features of degree 0 of shape \(2, 4, 2, 1\) must be",
                inputs=lambda rng: (clouds(rng), fiber(rng, batch=(2, 4))),
            ),
        ),
    ),
    Case(
        name="se3_particles",
        module=SE3Particles(TINY.clone(iterations=1)),
        inputs=particles,
        symmetries=(
            Symmetry(
                Product(Symmetric(5), SpecialEuclidean(3)),
                ("points", "vectors", "set"),
                "points",
                control=Euclidean(3),
                reason=CHIRAL,
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(
                match=r"positions \(2, 5, 3\), velocities \(2, 5, 3\) and charges \(2, 4, 1\) must be",
                inputs=lambda rng: (clouds(rng), clouds(rng), rng.normal(size=(2, 4, 1))),
            ),
        ),
    ),
    Case(
        name="se3_classifier",
        module=SE3Classifier(
            TINY.clone(iterations=1, out_features=(2, 2), project=AttentiveSelfInteraction), num_classes=3
        ),
        inputs=lambda rng: (clouds(rng),),
        symmetries=(
            Symmetry(
                Product(Symmetric(5), SpecialEuclidean(3)), ("points",), control=lambda x: jnp.sum(x**2, axis=(-1, -2))
            ),
        ),
        leading_axes=True,
        zero_gradients={
            "attention_0_0/edges/key/bias": "without features all points are alike, and the softmax ignores it"
        },
        bad_inputs=(BadInput(match=r"num_classes=0 must be positive", module=SE3Classifier(TINY, 0)),),
    ),
)

# Compiled in the least time: how well code is optimised is not what is tested.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def started(module, *inputs, **keywords):
    """Return parameters, moved off their initial values."""
    shapes = jax.eval_shape(functools.partial(module.init, **keywords), jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        # Made in NumPy: compiling the initialiser would take longer than the test.
        size = np.sqrt(2 / leaf.shape[-2]) if "kernel" in jax.tree_util.keystr(path) else 0.3
        ones = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(ones + size * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def assert_trees_close(found, expected, tolerance=1e-5):
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * size), found, expected)


# Exactness -----------------------------------------------------------------------------------------------------------


def test_attention_equals_loops_over_points_and_neighbours_in_numpy(rng):
    module = SE3Attention((4, 4), num_heads=2, bottleneck=2, relative="add", hidden_features=5)
    with jax.enable_x64(True):
        nodes = {degree: jnp.asarray(x) for degree, x in fiber(rng, batch=(4,)).items()}
        edges = edges_of(jnp.asarray(clouds(rng, (4,))), k_nearest(jnp.asarray(clouds(rng, (4,))), 2))
        variables = started(module, nodes, edges)
        found = fast(module.apply)(variables, nodes, edges)
        harmonics = jax.tree.map(np.asarray, spherical_harmonics(edges.vectors, 2))
    params, nodes, edges = jax.tree.map(np.asarray, (variables["params"], nodes, edges))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]

    def message(weights, i, at):
        """Sum of kernels times features of one neighbour, degree to [2, 2 l + 1]."""
        vector = edges.vectors[i, at]
        source = {k: x[edges.neighbours.indices[i, at]].copy() for k, x in nodes.items()}
        source[1][0] += vector
        out, start = {0: np.zeros((2, 1)), 1: np.zeros((2, 3))}, 0
        for index, (k, degree) in enumerate(pairs):
            hidden = np.linalg.norm(vector)[None]
            for layer in range(2):
                hidden = hidden @ weights[f"hidden_kernel_{layer}"][index] + weights[f"hidden_bias_{layer}"][index]
                hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
                hidden = hidden * weights[f"norm_scale_{layer}"][index] + weights[f"norm_bias_{layer}"][index]
                hidden = np.maximum(hidden, 0)
            paths = 2 * min(k, degree) + 1
            stop = start + 4 * paths
            radial = (hidden @ weights["kernel"][:, start:stop] + weights["bias"][start:stop]).reshape(2, 2, paths)
            start = stop
            for path, d, c in itertools.product(range(paths), range(2), range(2)):
                order = abs(k - degree) + path
                kernel = np.sqrt(2 * degree + 1) * clebsch_gordan(degree, k, order) @ harmonics[order][i, at]
                terms = 2 * sum(2 * min(other, degree) + 1 for other in (0, 1))
                out[degree][d] += radial[d, c, path] * kernel @ source[k][c] / np.sqrt(terms)
        return out

    for i in range(4):
        query = {k: np.einsum("ci,cd->di", x[i], params["query"][f"kernel_{k}"]) for k, x in nodes.items()}
        keys = [message(params["edges"]["key"], i, at) for at in range(2)]
        values = [message(params["edges"]["value"], i, at) for at in range(2)]
        summed = {0: np.zeros((2, 1)), 1: np.zeros((2, 3))}
        for head in range(2):
            scores = np.array([sum(query[k][head] @ key[k][head] for k in (0, 1)) for key in keys]) / np.sqrt(2 + 6)
            weights = np.exp(scores) / np.sum(np.exp(scores))
            for k in (0, 1):
                summed[k][head] = sum(weight * value[k][head] for weight, value in zip(weights, values, strict=True))
        for k in (0, 1):
            joined = np.concatenate([summed[k], nodes[k][i]])
            expected = np.einsum("ci,cd->di", joined, params["project"][f"kernel_{k}"])
            np.testing.assert_allclose(found[k][i], expected, atol=1e-10)


def test_positions_and_features_turn_with_the_points_after_every_iteration(rng):
    module = SE3Transformer((4, 4, 2), (2, 1), depth=1, iterations=3, bottleneck=2)
    x, nodes = float32((clouds(rng), fiber(rng)))
    variables = started(module, x, nodes)

    @fast
    def states(x, nodes):
        out, state = module.apply(variables, x, nodes, mutable=["intermediates"])
        return *state["intermediates"]["positions"], out.features

    # Improper elements: the negative control.
    claim = functools.partial(
        assert_equivariant, representations=["points", FIBER], output=("points",) * 3 + (FIBER,), tolerance=1e-5
    )
    call = lambda x, nodes: states(jnp.asarray(x), jax.tree.map(jnp.asarray, nodes))  # noqa: E731
    claim(call, SpecialEuclidean(3), np.asarray(x), jax.tree.map(np.asarray, nodes))
    with pytest.raises(AssertionError):
        claim(call, Euclidean(3), np.asarray(x), jax.tree.map(np.asarray, nodes))
    first, second, third, _ = states(x, nodes)
    assert min(float(jnp.max(jnp.abs(a - b))) for a, b in ((x, first), (first, second), (second, third))) > 1e-2


def test_scalars_alone_are_invariant_to_reflections_too(rng):
    module = SE3Transformer((4,), (2,), depth=1, bottleneck=2, relative="none")
    x = float32(clouds(rng))
    variables = started(module, x)
    apply = fast(lambda x: module.apply(variables, x).features[0])
    np.testing.assert_allclose(apply(-x), apply(x), atol=1e-5)


def test_gradient_of_an_invariant_is_equivariant(rng):
    module = SE3Classifier(TINY.clone(out_features=(2, 2)), num_classes=1)
    x = float32(clouds(rng))
    variables = started(module, x)
    gradient = fast(jax.grad(lambda x: jnp.sum(module.apply(variables, x))))
    assert_equivariant(
        lambda x: gradient(jnp.asarray(x)),
        SpecialEuclidean(3),
        np.asarray(x),
        representations=["points"],
        output="vectors",
        tolerance=1e-4,
    )


def test_permuted_points_give_permuted_positions_and_features(rng):
    module = TINY.clone(out_features=(2, 1), num_neighbours=3)
    x, nodes = float32((clouds(rng), fiber(rng)))
    apply = fast(functools.partial(module.apply, started(module, x, nodes)))
    order = rng.permutation(5)
    found = apply(x[:, order], {degree: part[:, order] for degree, part in nodes.items()})
    assert_trees_close(found, jax.tree.map(lambda leaf: leaf[:, order], apply(x, nodes)))


def test_layers_equal_the_reference_code():
    with np.load(GOLDEN) as file:
        golden = {name: file[name].astype(np.float64) for name in file.files if name != "provenance"}
    factors = {(k, degree): golden[f"factor_{k}_{degree}"] for k in range(3) for degree in range(3)}
    kernel = functools.partial(radial_kernel_from_reference, factors=factors)
    with jax.enable_x64(True):
        x = jnp.asarray(golden["positions"])
        weights = jnp.asarray(golden["weights"]).reshape(5, 4, 1)
        # The vectors of the reference point away from the neighbour.
        edges = edges_of(-x, everyone(5), weights)
        nodes = {0: jnp.asarray(golden["charges"]), 1: jnp.asarray(golden["velocities"])}

        def linear(prefix, degrees):
            return {f"kernel_{degree}": golden[f"{prefix}.{degree}"].T for degree in degrees}

        def compare(found, name):
            for degree, part in found.items():
                expected = golden[f"{name}/out_{degree}"] @ golden[f"change_{degree}"]
                np.testing.assert_allclose(part, expected, atol=1e-5 * np.max(np.abs(expected)))

        convolution = {
            "messages": {"kernel": kernel(golden, "convolution/0/", {0: 2, 1: 1}, (4, 4, 4))},
            "self": {f"kernel_{degree}": golden[f"convolution/0/kernel_self.{degree}"][0].T for degree in (0, 1)},
        }
        first = {
            "query": linear("attention/0/GMAB.q.transform", (0, 1)),
            "edges": {
                "key": kernel(golden, "attention/0/GMAB.k.", {0: 2, 1: 1}, (2, 2)),
                "value": kernel(golden, "attention/0/GMAB.v.", {0: 2, 1: 1}, (2, 2, 2)),
            },
            "project": linear("attention/0/project.transform", (0, 1, 2)),
        }
        biases = {f"bias_{degree}": golden[f"attention/1/bias.{degree}"][0] for degree in (0, 1, 2)}
        inner = {0: 4, 1: 5, 2: 4}
        last = {
            "query": linear("attention/2/GMAB.q.transform", (1,)),
            "edges": {
                "key": kernel(golden, "attention/2/GMAB.k.", inner, (0, 2)),
                "value": kernel(golden, "attention/2/GMAB.v.", inner, (0, 2)),
            },
            "project": {
                "norm_1": {
                    "scale": golden["attention/2/project.transform.1.0.weight"],
                    "bias": golden["attention/2/project.transform.1.0.bias"],
                },
                "weights_1": {
                    "kernel": golden["attention/2/project.transform.1.2.weight"].T,
                    "bias": golden["attention/2/project.transform.1.2.bias"],
                },
            },
        }

        convolution, first, biases, last = jax.tree.map(jnp.asarray, (convolution, first, biases, last))
        compare(fast(TensorFieldConv((4, 4, 4)).apply)({"params": convolution}, nodes, edges), "convolution")

        @fast
        def row(nodes, edges):
            nodes = SE3Attention((4, 4, 4), 2, 2).apply({"params": first}, nodes, edges)
            nodes = FiberNormNonlinearity().apply({"params": biases}, nodes)
            module = SE3Attention((0, 2), 2, 1, relative="concatenate", project=AttentiveSelfInteraction)
            return module.apply({"params": last}, nodes, edges)

        compare(row(nodes, edges), "attention")


# Iterations ----------------------------------------------------------------------------------------------------------


def test_one_iteration_is_the_layers_in_a_row_on_the_first_positions(rng):
    module = TINY.clone(iterations=1, depth=2)
    x, nodes = float32((clouds(rng), fiber(rng)))
    variables = started(module, x, nodes)
    found = fast(module.apply)(variables, x, nodes)

    @fast
    def single_pass(params, nodes):
        edges = edges_of(x, everyone(jnp.ones(x.shape[:-1], bool)))
        for layer in range(2):
            block = SE3Attention((4, 4), 2, 2, relative="add")
            nodes = block.apply({"params": params[f"attention_0_{layer}"]}, nodes, edges)
            nodes = FiberNormNonlinearity().apply({"params": params[f"nonlinearity_0_{layer}"]}, nodes)
        return SE3Attention((0, 1), 1, 1, relative="add").apply({"params": params["out"]}, nodes, edges)

    update = single_pass(variables["params"], nodes)[1]
    np.testing.assert_allclose(found.positions, x + update[..., 0, :], atol=1e-5)
    np.testing.assert_allclose(found.features[1], update, atol=1e-5)


def test_gradients_of_positions_match_finite_differences_and_run_through_the_basis(rng):
    module = TINY.clone(chunk=2)
    with jax.enable_x64(True):
        x, weights = jnp.asarray(clouds(rng, (4,))), jnp.asarray(rng.normal(size=(4, 3)))
        variables = started(module, x)

        def total(x, module):
            return jnp.sum(module.apply(variables, x).positions * weights)

        value, gradient = (fast(functools.partial(fn, module=module)) for fn in (total, jax.grad(total)))
        stopped = fast(functools.partial(jax.grad(total), module=module.clone(basis_gradient=False)))(x)
        found = gradient(x)
        for index in ((0, 0), (1, 2), (3, 1)):
            step = jnp.zeros_like(x).at[index].set(1e-6)
            expected = (value(x + step) - value(x - step)) / 2e-6
            np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-7)
    assert float(jnp.max(jnp.abs(found - stopped))) > 1e-3


def test_edge_features_follow_the_moved_points(rng):
    seen = []

    def potential(distances, edges):
        seen.append(distances.shape)
        return jnp.concatenate([edges, jnp.square(distances - edges)], axis=-1)

    x, parameters = float32((clouds(rng), rng.random((2, 5, 4, 1))))
    module = TINY.clone(edge_features=potential)
    variables = started(module, x, edges=parameters)
    seen.clear()
    out = jax.eval_shape(functools.partial(module.apply, variables), x, edges=parameters)
    assert out.positions.shape == x.shape
    assert seen == [(2, 5, 4, 1)] * 2


# Chunks, memory, sharding --------------------------------------------------------------------------------------------


def test_chunks_change_neither_values_nor_gradients(rng):
    module = TINY.clone(iterations=1, num_neighbours=3)
    x, nodes = float32((clouds(rng), fiber(rng)))
    variables = started(module, x, nodes)

    def step(module, variables, x):
        out = module.apply(variables, x, nodes)
        return jnp.sum(jnp.square(out.positions)), out

    found, expected = (
        fast(jax.value_and_grad(functools.partial(step, module), argnums=(0, 1), has_aux=True))(variables, x)
        for module in (module.clone(chunk=2), module)
    )
    assert_trees_close(found, expected)
    # As many as there are, or more, are all at once.
    whole = fast(module.clone(chunk=8).apply)(variables, x, nodes)
    assert_trees_close(whole, expected[0][1])


def temporary_bytes(points, chunk):
    """Return what the compiled gradient of a layer needs besides its arguments, from its compilation alone."""
    module = SE3Attention((8, 8), chunk=chunk)
    floats, lists = jax.ShapeDtypeStruct((points, 8, 3), jnp.float32), (points, 8)
    edges = Edges(
        Neighbours(jax.ShapeDtypeStruct(lists, jnp.int32), jax.ShapeDtypeStruct(lists, jnp.bool_)), floats, floats
    )
    params = jax.eval_shape(module.init, jax.random.key(0), {1: floats}, edges)

    def loss(params, vectors, edges):
        out = module.apply(params, {1: vectors}, edges)
        return sum(jnp.sum(jnp.square(part)) for part in out.values())

    program = fast(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, floats, edges).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_chunks_does_not_grow_with_the_edges():
    plain, chunked = ([temporary_bytes(points, chunk) for points in (64, 256)] for chunk in (None, 16))
    assert plain[1] > 3.5 * plain[0]
    # Four times the edges: what remains to grow is features of points and the lists.
    assert chunked[1] < 1.6 * chunked[0]
    assert chunked[1] < plain[1] / 8


def test_points_split_over_devices_give_the_same_positions_and_gradients(rng):
    module = TINY.clone(iterations=1, chunk=4)
    x, lists = float32(clouds(rng, (2, 16))), k_nearest(float32(clouds(rng, (2, 16))), 4)
    variables = started(module, x)

    def step(variables, x, lists):
        out = module.apply(variables, x, neighbours=lists)
        return jnp.sum(jnp.square(out.positions)), out.positions

    gradient = jax.value_and_grad(step, argnums=(0, 1), has_aux=True)
    (_, positions), gradients = fast(gradient)(variables, x, lists)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data", "sequence")))  # noqa: E731
    rules = ((axes.BATCH, "data"), (axes.NODES, "sequence"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        (_, found), found_gradients = fast(gradient)(variables, *jax.tree.map(place, (x, lists)))
    assert found.sharding.spec[:2] == ("data", "sequence")
    np.testing.assert_allclose(found, positions, atol=1e-5)
    assert_trees_close(found_gradients, gradients, 1e-4)


# Padding and degenerate input ----------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_gets_no_gradient(rng):
    module = TINY.clone(out_features=(2, 1))
    x, nodes = float32((clouds(rng), fiber(rng)))
    variables = started(module, x, nodes)
    wide = jax.tree.map(
        lambda part: jnp.concatenate([part, jnp.full((2, 2, *part.shape[2:]), 1e3)], axis=1), (x, nodes)
    )
    mask = jnp.array([[True] * 5 + [False] * 2] * 2)
    expected = fast(module.apply)(variables, x, nodes)

    def padded(x, nodes):
        out = module.apply(variables, x, nodes, mask=mask)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    (_, found), gradients = fast(jax.value_and_grad(padded, argnums=(0, 1), has_aux=True))(*wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, :5], b, atol=1e-6 * 10), found, expected)
    for leaf in jax.tree.leaves((gradients, found)):
        np.testing.assert_array_equal(leaf[:, 5:], 0.0)


CUBE = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))


DEGENERATE = {
    "tetrahedron": CUBE[[0, 3, 5, 6]],
    "cube": CUBE,
    "line": np.outer([-1.0, 0.2, 0.5, 1.3], [1, 2, 3]),
    "point thrice": np.ones((3, 3)),
    "single point": np.ones((1, 3)),
    "no point": np.ones((0, 3)),
}


def test_degenerate_clouds_are_exact_with_finite_gradients(rng):
    module = TINY.clone(features=(4, 4, 4), out_features=(2, 1), iterations=1)
    x = float32(np.stack([np.pad(cloud, ((0, 8 - len(cloud)), (0, 0))) for cloud in DEGENERATE.values()]))
    mask = jnp.stack([jnp.arange(8) < len(cloud) for cloud in DEGENERATE.values()])
    variables = started(module, x, mask=mask)

    def total(x):
        out = module.apply(variables, x, mask=mask)
        return jnp.sum(jnp.square(out.positions)), out

    step = fast(jax.value_and_grad(total, has_aux=True))
    (_, out), gradient = step(x)
    r = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    r = float32(r * np.sign(np.linalg.det(r)))
    (_, turned), _ = step(x @ r.T)
    expected = Moved(out.positions @ r.T, rotate_fiber(out.features, r))
    for index, name in enumerate(DEGENERATE):
        part, found, wanted = (
            jax.tree.map(lambda leaf, index=index: leaf[index], tree) for tree in ((out, gradient), turned, expected)
        )
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(part)), name
        if name != "no point":
            assert_trees_close(found, wanted)


def test_a_single_point_without_a_mask_has_a_value():
    out = jax.eval_shape(lambda x: TINY.apply(started(TINY, x), x), jnp.ones((1, 3)))
    assert out.positions.shape == (1, 3)


def test_nan_comes_out_and_distant_batch_companions_stay(rng):
    x = float32(clouds(rng)).at[0, 1, 2].set(jnp.nan)
    out = fast(TINY.apply)(started(TINY, float32(clouds(rng))), x).positions
    assert bool(jnp.any(jnp.isnan(out[0, 1])))
    assert bool(jnp.all(jnp.isfinite(out[1])))


def test_edges_that_belong_to_no_fixed_lists_are_refused(rng, untyped):
    x = float32(clouds(rng))
    with pytest.raises(ValueError, match=r"edges of shape \(2, 5, 3, 1\) belong to lists, but num_neighbours=3"):
        TINY.clone(num_neighbours=3).init(jax.random.key(0), x, edges=jnp.ones((2, 5, 3, 1)))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 4\) must be \[\*batch, points\]"):
        TINY.init(jax.random.key(0), x, mask=jnp.ones((2, 4), bool))

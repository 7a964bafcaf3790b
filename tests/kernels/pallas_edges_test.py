"""The kernels for edges against their jnp twin: interpreted on CPU in value and gradient, and compiled for a TPU."""

import functools
import itertools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.equivariant import RadialKernel, SE3Transformer, TensorFieldConv
from jaxlayers.equivariant.fibers import Factors, edges_of, rotate_fiber, tensor_products
from jaxlayers.kernels import dispatch
from jaxlayers.kernels.pallas_edges import edge_messages
from jaxlayers.ops.neighbours import k_nearest
from train.collectives import collectives

# Interpreted kernels are long programs, whose compilation is what takes time.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(hidden, kernel, bias, basis, sources, features):
    """Return the messages as they are written in a paper: whole kernels of every edge, times features."""
    out = dict.fromkeys(features, jnp.zeros(()))
    start = 0
    for index, (k, degree) in enumerate(sorted(basis)):
        channels, paths = sources[k].shape[-2], basis[k, degree].shape[-3]
        columns = slice(start, start + features[degree] * channels * paths)
        start = columns.stop
        radial = jnp.einsum("...h,ho->...o", hidden[..., index, :], kernel[:, columns], precision="highest")
        radial = (radial + bias[columns]).reshape(*radial.shape[:-1], features[degree], channels, paths)
        whole = jnp.einsum("...dcj,...jab->...dacb", radial, basis[k, degree], precision="highest")
        out[degree] += jnp.einsum("...dacb,...cb->...da", whole, sources[k], precision="highest")
    return out


def differentiated(function, features):
    """Return a function of the operands that gives the messages and the gradients of a sum of them."""

    def total(*operands):
        out = function(*operands, features)
        return sum(jnp.sum(jnp.sin(0.3 * x)) for x in out.values()), out

    def both(*operands):
        (_, out), gradients = jax.value_and_grad(total, argnums=tuple(range(5)), has_aux=True)(*operands)
        return out, gradients

    return fast(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max(initial=1.0))


def problem(edges, channels, features, hidden=5, dtype=jnp.float32):
    """Return the operands for messages from all degrees of the channels to all of the features."""
    pairs = list(itertools.product(channels, features))
    outputs = sum(channels[k] * features[degree] * (2 * min(k, degree) + 1) for k, degree in pairs)
    shape = lambda k, degree: (2 * min(k, degree) + 1, 2 * degree + 1, 2 * k + 1)  # noqa: E731
    return (
        draw(0, *edges, len(pairs), hidden, dtype=dtype),
        draw(1, hidden, outputs, dtype=dtype) / 3,
        draw(2, outputs, dtype=dtype),
        {pair: draw(3 + sum(pair), *edges, *shape(*pair), dtype=dtype) for pair in pairs},
        {k: draw(9 + k, *edges, count, 2 * k + 1, dtype=dtype) for k, count in channels.items()},
    )


PROBLEMS = {
    # Channels that are several tiles of eight rows, loops with a rest, a block that is not full.
    "several-tiles": ((2, 5, 3), {0: 9}, {1: 17}),
    # All pairs of degrees; two blocks of edges, the second not full, add to the gradients of the weights.
    "all-degrees-in-two-blocks": ((4, 50), {0: 4, 1: 1, 2: 2}, {0: 2, 1: 3, 2: 1}),
    "a-full-block": ((8, 16), {1: 8}, {1: 8}),
    "no-edges-from-0-and-2-to-1": ((3, 0), {0: 1, 2: 1}, {1: 2}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_whole_kernels_of_edges_in_value_and_gradient(name):
    edges, channels, features = PROBLEMS[name]
    operands = problem(edges, channels, features)
    found = differentiated(edge_messages, features)(*operands)
    expected = differentiated(plain, features)(*operands)
    assert_equal(found, expected)


def test_a_bias_that_differs_is_seen():
    edges, channels, features = PROBLEMS["all-degrees-in-two-blocks"]
    hidden, kernel, bias, basis, sources = problem(edges, channels, features)
    apply = fast(functools.partial(edge_messages, features=features))
    before, after = (apply(hidden, kernel, each, basis, sources) for each in (bias, bias.at[-1].add(0.1)))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(after[2], before[2])
    assert_equal((after[0], after[1]), (before[0], before[1]))


def test_bfloat16_operands_give_messages_and_gradients_of_their_own_dtype():
    edges, channels, features = PROBLEMS["all-degrees-in-two-blocks"]
    operands = problem(edges, channels, features, dtype=jnp.bfloat16)
    found = differentiated(edge_messages, features)(*operands)
    exact = differentiated(plain, features)(*jax.tree.map(lambda x: x.astype(jnp.float32), operands))
    assert_equal(found[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact[0]), tolerance=0.01)
    # Gradients are of messages that were rounded: a few hundredths at most, in the mean no more than the twin's.
    twin = differentiated(plain, features)(*operands)
    for one, other, wanted in zip(*map(jax.tree.leaves, (found, twin, exact)), strict=True):
        assert one.dtype == jnp.bfloat16
        one, other = (np.asarray(x, np.float32) - np.asarray(wanted) for x in (one, other))
        assert np.sqrt(np.mean(one**2)) <= 1.5 * np.sqrt(np.mean(other**2)) + 1e-6
        assert np.abs(one).max(initial=0.0) < 0.06 * np.abs(wanted).max(initial=1.0)


def layers():
    """Return a convolution and lists of 5 points, three neighbours each."""
    x = draw(0, 2, 5, 3)
    nodes = {0: draw(1, 2, 5, 3, 1), 1: draw(2, 2, 5, 2, 3)}
    return TensorFieldConv((4, 3), hidden_features=8), x, nodes, k_nearest(x, 3)


def both_choices(step, *operands):
    """Return what `step` gives by the kernel and by its twin."""
    found = []
    for choice in ("pallas", "jnp"):
        with dispatch.use(choice):
            compiled = fast(step).lower(*operands)
            assert ("edge_messages" in compiled.as_text(debug_info=True)) == (choice == "pallas")
            found.append(compiled.compile()(*operands))
    return found


@pytest.mark.parametrize("chunk", [None, 2])
def test_convolutions_are_the_same_by_either_kernel_in_chunks_too(chunk):
    module, x, nodes, lists = layers()
    module = module.clone(chunk=chunk)
    variables = fast(module.init)(jax.random.key(0), nodes, edges_of(x, lists))

    def loss(variables, x, nodes):
        out = module.apply(variables, nodes, edges_of(x, lists))
        return sum(jnp.sum(jnp.sin(part)) for part in out.values())

    found, expected = both_choices(jax.value_and_grad(loss, argnums=(0, 1, 2)), variables, x, nodes)
    assert_equal(found, expected)


def test_parameters_are_the_same_by_either_kernel():
    module, x, nodes, lists = layers()
    edges = edges_of(x, lists)
    expected = fast(module.init)(jax.random.key(0), nodes, edges)
    with dispatch.use("pallas"):
        found = fast(module.init)(jax.random.key(0), nodes, edges)
    # Of trees that differ it would raise.
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_radial_kernel_takes_products_or_their_factors():
    *_, basis, sources = problem((6,), {0: 2, 1: 3}, {0: 1, 1: 1})
    module, radial = RadialKernel((4, 2), hidden_features=8), jnp.abs(draw(0, 6, 1))
    products = tensor_products(sources, basis, (0, 1))
    expected, variables = fast(module.init_with_output)(jax.random.key(0), products, radial)
    assert_equal(fast(module.apply)(variables, Factors(sources, basis), radial), expected)
    with pytest.raises(ValueError, match=r"asks for degree 2, but the products lead to degrees \[0, 1\]"):
        RadialKernel((1, 1, 1)).init(jax.random.key(0), Factors(sources, basis), radial)


TRANSFORMER = SE3Transformer(features=(4, 4), out_features=(2, 1), depth=1, bottleneck=2, num_neighbours=3)


def test_transformers_are_the_same_by_either_kernel():
    x = draw(0, 5, 3)
    variables = fast(TRANSFORMER.init)(jax.random.key(0), x)

    def loss(variables, x):
        out: Any = TRANSFORMER.apply(variables, x)
        return jnp.sum(jnp.sin(out.positions)) + jnp.sum(out.features[0])

    found, expected = both_choices(jax.value_and_grad(loss, argnums=(0, 1)), variables, x)
    assert_equal(found, expected, tolerance=2e-5)


def test_transformers_by_the_kernel_turn_with_the_points():
    x = draw(0, 5, 3)
    variables = fast(TRANSFORMER.init)(jax.random.key(0), x)
    q = jnp.linalg.qr(draw(1, 3, 3))[0]
    rotation = q * jnp.sign(jnp.linalg.det(q))
    with dispatch.use("pallas"):
        apply = fast(TRANSFORMER.apply)
        out, turned, mirrored = (apply(variables, x @ r.T) for r in (jnp.eye(3), rotation, -rotation))
    assert_equal(turned.positions, out.positions @ rotation.T)
    assert_equal(turned.features, rotate_fiber(out.features, rotation))
    # The control: it is not the reflection that the symmetry leaves out.
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(mirrored.positions, -out.positions @ rotation.T, tolerance=1e-4)


RULES = ((axes.BATCH, "data"), (axes.NODES, "sequence"))


def mesh():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)


def test_edges_split_over_batch_and_points_equal_unsplit_ones_and_send_the_gradients_of_weights_alone():
    features = {0: 2, 1: 3}
    operands = problem((2, 4, 3), {0: 2, 1: 3}, features)
    expected = differentiated(edge_messages, features)(*operands)
    whole, split = NamedSharding(mesh(), PartitionSpec()), NamedSharding(mesh(), PartitionSpec("data", "sequence"))
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        places = (split, whole, whole, split, split)
        placed = [jax.device_put(x, place) for x, place in zip(operands, places, strict=True)]
        compiled = differentiated(edge_messages, features).lower(*placed).compile()
        found = compiled(*placed)
    assert_equal(found, expected)
    assert found[0][1].sharding.spec[:2] == ("data", "sequence")
    sent = collectives(compiled.as_text(), mesh())
    assert {each.kind for each in sent} == {"all-reduce"}
    assert sum(each.bytes for each in sent) <= 4 * (operands[1].size + operands[2].size + 2)


def test_chunks_of_points_split_over_devices_equal_unsplit_ones():
    module, _, nodes, _ = layers()
    module, x = module.clone(chunk=2), draw(0, 2, 8, 3)
    nodes, lists = {0: draw(1, 2, 8, 3, 1), 1: draw(2, 2, 8, 2, 3)}, k_nearest(x, 3)
    variables = fast(module.init)(jax.random.key(0), nodes, edges_of(x, lists))

    def loss(variables, x, nodes, lists):
        out = module.apply(variables, nodes, edges_of(x, lists))
        return sum(jnp.sum(jnp.sin(part)) for part in out.values())

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    expected = fast(step)(variables, x, nodes, lists)
    place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh(), PartitionSpec("data", "sequence")))  # noqa: E731
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES), dispatch.use("pallas"):
        found = fast(step)(variables, *jax.tree.map(place, (x, nodes, lists)))
    assert_equal(found, expected, tolerance=2e-5)


def test_what_the_kernel_for_edges_does_not_serve_is_refused_or_left_to_jnp():
    module, x, nodes, lists = layers()
    cases = {
        "dtype=.*float16.* must be float32 or bfloat16": module.clone(dtype=jnp.float16),
        "radial functions of 25000 outputs must have at most 24576": TensorFieldConv((5000,)),
    }
    for message, layer in cases.items():
        init = functools.partial(layer.init, jax.random.key(0))
        with dispatch.use("pallas"), pytest.raises(ValueError, match=message):
            jax.eval_shape(init, nodes, edges_of(x, lists))
        with dispatch.use("table", platform="tpu"):
            jax.eval_shape(init, nodes, edges_of(x, lists))


def test_the_table_takes_the_kernel_for_edges_on_tpu_alone():
    def kernel(choice, platform, outputs=2400, degree=1, dtype=jnp.float32):
        with dispatch.use(choice, platform=platform):
            return dispatch.edge_kernel(outputs, degree, dtype)

    assert dispatch.edge_kernel(2400, 1, jnp.float32) == "jnp"
    assert kernel("table", "tpu") == "pallas"
    # Nothing was weighed there.
    assert kernel("table", "tpu", outputs=100) == kernel("table", "tpu", degree=3) == "jnp"
    assert kernel("table", "tpu", dtype=jnp.bfloat16) == "jnp"
    assert kernel("table", "cpu") == kernel("table", "gpu") == kernel("jnp", "tpu") == "jnp"
    assert kernel("pallas", "cpu", outputs=4, degree=0) == "pallas"
    with pytest.raises(ValueError, match="platform 'gpu' must be TPU"):
        kernel("pallas", "gpu")


def test_operands_of_edges_that_do_not_fit_are_refused():
    features = {1: 2}
    hidden, kernel, bias, basis, sources = problem((3, 4), {0: 2, 1: 3}, features)
    with pytest.raises(ValueError, match=r"kernel of shape \(5, 21\) must be \(5, 22\)"):
        edge_messages(hidden, kernel[:, 1:], bias[1:], basis, sources, features)
    with pytest.raises(ValueError, match=r"hidden of shape \(3, 4, 1, 5\) must be \(3, 4, 2, 5\)"):
        edge_messages(hidden[:, :, :1], kernel, bias, basis, sources, features)
    with pytest.raises(ValueError, match=r"sources of 1 of shape \(2, 4, 3, 3\) must be \(3, 4, 3, 3\) for edges"):
        edge_messages(hidden, kernel, bias, basis, {**sources, 1: sources[1][:2]}, features)


@pytest.mark.tpu
@pytest.mark.parametrize(("channels", "max_degree"), [(20, 1), (5, 2), (32, 2)])
def test_kernels_for_edges_compile_for_tpu(channels, max_degree):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = SingleDeviceSharding(topology.devices[0])
    features = dict.fromkeys(range(max_degree + 1), channels)
    operands = jax.eval_shape(functools.partial(problem, (64, 63), features, features, hidden=32))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands)
    text = differentiated(edge_messages, features).lower(*shapes).compile().as_text()
    assert "tpu_custom_call" in text
    assert os.environ.get("JAX_PLATFORMS") == "cpu"

"""The contenders that the benchmark writes itself compute the same functions as ours, or as much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant import EGNN, RadialKernel, SteerableConv
from jaxlayers.equivariant.fibers import kernel_basis, tensor_products
from jaxlayers.geometry.groups import Cyclic
from jaxlayers.geometry.planar_fields import FieldType
from jaxlayers.hopfield import Hopfield
from tools import bench_equivariant, bench_hopfield

torch = pytest.importorskip("torch")


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def dense(linear):
    found = {"kernel": array(linear.weight.T)}
    return found | {"bias": array(linear.bias)} if linear.bias is not None else found


def egnn_params(network):
    params = {"embedding": dense(network.embedding)}
    for index, layer in enumerate(network.layers):
        params[f"layers_{index}"] = own = {
            "message_up": dense(layer.message[0]),
            "message_down": dense(layer.message[2]),
            "position_up": dense(layer.move[0]),
            "position_down": dense(layer.move[2]),
        }
        if layer.node is not None:
            own["node"] = {"up": dense(layer.node[0]), "down": dense(layer.node[2])}
    return params


def test_egnn_with_edge_lists_is_our_egnn(rng):
    torch.manual_seed(0)
    network = bench_equivariant.torch_egnn_module(8, 3)
    x = rng.normal(size=(6, 3)).astype(np.float32)
    pairs = torch.nonzero(~torch.eye(6, dtype=torch.bool)).T
    expected = array(network(torch.tensor(x), pairs[0], pairs[1]))
    model = EGNN(features=8, depth=3)
    found = model.apply({"params": egnn_params(network)}, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(np.asarray(expected) - x).max() > 1e-2
    # Negative control: a graph without one of the points is another function.
    fewer = pairs[:, (pairs != 5).all(0)]
    assert np.abs(network(torch.tensor(x), fewer[0], fewer[1]).detach().numpy() - np.asarray(found)).max() > 1e-3


def test_turned_filters_are_our_group_convolution(rng):
    kind = FieldType.regular(Cyclic(4), 2)
    layer = SteerableConv(kind, kind)
    x = rng.normal(size=(1, 7, 7, 8)).astype(np.float32)
    variables = layer.init(jax.random.key(0), jnp.asarray(x))
    theirs = bench_equivariant.torch_group_conv_module(2)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(leaf.numel() for leaf in theirs.parameters())
    # Our filters, read off from the answers to single pixels; those of the first element of each field are the weights.
    taps = np.zeros((8, 5, 5, 8), np.float32)
    taps[np.arange(8), 2, 2, np.arange(8)] = 1
    answers = np.asarray(layer.apply(variables, jnp.asarray(taps)))[:, 1:4, 1:4]
    kernel = answers[:, ::-1, ::-1].transpose(3, 0, 1, 2)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(kernel[::4].reshape(2, 2, 4, 3, 3).copy()))
        found = theirs(torch.tensor(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(np.moveaxis(found, 1, -1), layer.apply(variables, jnp.asarray(x)), atol=1e-5)


def test_convolution_of_e3nn_has_our_paths_and_turns_with_the_points(rng):
    pytest.importorskip("e3nn_jax")
    channels = bench_equivariant.CHANNELS
    init, apply = bench_equivariant.e3nn_convolution()
    params = init()
    sources = {0: jnp.ones((1, channels, 1)), 1: jnp.ones((1, channels, 3))}
    products = tensor_products(sources, kernel_basis(jnp.ones((1, 3)), (0, 1), (0, 1)), (0, 1))
    shapes = jax.eval_shape(RadialKernel((channels, channels)).init, jax.random.key(0), products, jnp.ones((1, 1)))
    weights = [leaf.shape[-1] for leaf in jax.tree.leaves(params)]
    assert max(weights) == shapes["params"]["kernel"].shape[-1]
    x, scalars, vectors = bench_equivariant._cloud(20)
    from jaxlayers.ops.neighbours import k_nearest

    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn = jnp.asarray(turn * np.sign(np.linalg.det(turn)), jnp.float32)
    lists = k_nearest(x, 4)
    straight = apply(params, x, scalars, vectors, lists)
    turned = apply(params, x @ turn.T, scalars, vectors @ turn.T, lists)
    np.testing.assert_allclose(turned[:, :channels], straight[:, :channels], atol=1e-4)
    expected = straight[:, channels:].reshape(20, channels, 3) @ turn.T
    np.testing.assert_allclose(turned[:, channels:].reshape(20, channels, 3), expected, atol=1e-4)
    assert np.abs(expected - straight[:, channels:].reshape(20, channels, 3)).max() > 0.1


@pytest.mark.parametrize("updates", [1, 4])
def test_reference_hopfield_layer_makes_as_many_updates_as_ours(rng, updates):
    hflayers = pytest.importorskip("hflayers")
    from jaxlayers.hopfield.hopfield import from_reference

    torch.manual_seed(0)
    theirs = hflayers.Hopfield(input_size=16, num_heads=4, update_steps_max=updates - 1, update_steps_eps=1e-30).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) / (4 if parameter.ndim > 1 else 1))
    state, stored = (jnp.asarray(rng.normal(size=(2, rows, 16)), jnp.float32) for rows in (5, 7))
    layer = Hopfield(num_heads=4, update_steps=updates)
    params = jax.eval_shape(layer.init, jax.random.key(0), state, stored)["params"]
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    found = layer.apply({"params": from_reference(tensors, params)}, state, stored)
    state, stored = (torch.tensor(np.asarray(x)) for x in (state, stored))
    expected = theirs((stored, state, stored)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_programs_of_both_sides_have_one_name_and_size():
    pytest.importorskip("hflayers")
    settings = {"kind": "Hopfield", "updates": 4, "train": False, "patterns": [3], "states": 2}
    (ours,), (theirs,) = bench_hopfield.ours(**settings), bench_hopfield.theirs(**settings)
    assert (ours.name, ours.parameters) == (theirs.name, theirs.parameters)

"""Maps that commute with permutations: their number and span against the solved basis, masks, and clear errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.geometry.groups import Symmetric
from jaxlayers.ops.permutation_maps import map_count, node_mask, partitions, permutation_map
from jaxlayers.testing import assert_equivariant

ORDERS = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 0), (1, 0), (0, 2)]


def action(permutation, order):
    """The matrix of a permutation on tensors of that order, flattened."""
    size = len(permutation)
    matrix = np.zeros((size**order, size**order))
    for source in itertools.product(range(size), repeat=order):
        target = tuple(permutation[i] for i in source)
        matrix[
            np.ravel_multi_index(target, (size,) * order) if order else 0,
            np.ravel_multi_index(source, (size,) * order) if order else 0,
        ] = 1
    return matrix


def solved(order, out_order, size):
    """An orthonormal basis of the maps that commute with the generators, as rows, from the null space in float64."""
    swap, turn = [*range(1, min(size, 2)), 0, *range(2, size)], [*range(1, size), 0]
    return commuting([(action(permutation, out_order), action(permutation, order)) for permutation in (swap, turn)])


def commuting(pairs):
    """An orthonormal basis of the L with B L = L A for all pairs (B, A) of matrices, flattened, as rows."""
    # vec(B L A^-1 - L) = 0
    rows = [np.kron(left, np.linalg.inv(right).T) - np.eye(left.shape[0] * right.shape[0]) for left, right in pairs]
    _, values, vectors = np.linalg.svd(np.concatenate(rows))
    return vectors[values < 1e-9]


@pytest.mark.slow
def test_solver_finds_the_known_dimension_of_lorentz_tensors():
    # O(1, 3) from vectors to tensors with two indices up and one down: v^a times the identity, two ways, and v_c g^ab.
    metric, a = np.diag([1.0, -1, -1, -1]), 0.7
    boost, turn, other = np.eye(4), np.eye(4), np.eye(4)
    boost[:2, :2] = [[np.cosh(a), np.sinh(a)], [np.sinh(a), np.cosh(a)]]
    turn[1:3, 1:3] = other[2:, 2:] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    elements = [boost, turn, other, metric, -metric]
    assert all(np.allclose(g.T @ metric @ g, metric) for g in elements)
    pairs = [(np.kron(np.kron(g, g), np.linalg.inv(g).T), g) for g in elements]
    assert len(commuting(pairs)) == 3
    # Without the metric, for all invertible maps, the first two are left.
    general = [np.eye(4) + np.diag([0.3, 0, 0, 0]), np.eye(4) + 0.5 * np.eye(4, k=1), *elements]
    assert len(commuting([(np.kron(np.kron(g, g), np.linalg.inv(g).T), g) for g in general])) == 2


def matrices(order, out_order, size):
    """Every map as a matrix, read off from what it makes of the standard basis."""
    count = map_count(order, out_order)
    unit = jnp.eye(size**order).reshape(size**order, *(size,) * order, 1)
    kernel = jnp.eye(count)[:, None]  # one output feature for each map
    found = permutation_map(unit, kernel, order, out_order, nodes=size, normalize=False)
    return np.asarray(found).reshape(size**order, size**out_order, count).transpose(2, 1, 0).reshape(count, -1)


def test_numbers_are_those_of_bell():
    assert [len(partitions(count)) for count in range(5)] == [1, 1, 2, 5, 15]
    assert [map_count(*orders) for orders in ORDERS] == [2, 5, 5, 15, 2, 1, 2]
    assert len(set(partitions(4))) == 15


@pytest.mark.parametrize(("order", "out_order", "size"), [*((*orders, 4) for orders in ORDERS), (2, 2, 5)])
def test_maps_are_a_basis_of_the_solved_space(order, out_order, size):
    basis, found = solved(order, out_order, size), matrices(order, out_order, size)
    assert len(basis) == len(found) == np.linalg.matrix_rank(found)
    np.testing.assert_allclose(found - (found @ basis.T) @ basis, 0, atol=1e-6)


@pytest.mark.parametrize(("size", "dimension"), [(1, 1), (2, 8), (3, 14)])
def test_few_nodes_have_fewer_maps_and_all_are_reached(size, dimension):
    basis, found = solved(2, 2, size), matrices(2, 2, size)
    assert len(basis) == np.linalg.matrix_rank(found) == dimension


@pytest.mark.parametrize(("order", "out_order"), [orders for orders in ORDERS if orders[0]])
def test_permuting_the_input_permutes_the_output(order, out_order):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(map_count(order, out_order), 2, 3)), jnp.float32)
    names = ("scalar", "set", "edges")
    x = rng.normal(size=(2, *(5,) * order, 2)).astype(np.float32)
    assert_equivariant(
        jax.jit(lambda x: permutation_map(x, kernel, order, out_order, nodes=5)),
        Symmetric(5),
        x,
        representations=(names[order],),
        output=names[out_order],
    )
    if out_order:
        with pytest.raises(AssertionError):  # the control: one node is treated apart
            assert_equivariant(
                lambda x: permutation_map(jnp.asarray(x).at[:, 0].multiply(2), kernel, order, out_order),
                Symmetric(5),
                x,
                representations=(names[order],),
                output=names[out_order],
            )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("order", "out_order"), ORDERS)
def test_padding_changes_nothing_whatever_it_holds(order, out_order, normalize):
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(map_count(order, out_order), 2, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(*(3,) * order, 2)), jnp.float32)
    mask = np.array([True, False, True, True, False])
    places = np.ix_(*[np.flatnonzero(mask)] * order)
    out_places = np.ix_(*[np.flatnonzero(mask)] * out_order)
    wide = jnp.full((*(5,) * order, 2), jnp.nan).at[places].set(x) if order else x

    def both(x, mask, nodes):
        def loss(x):
            found = permutation_map(x, kernel, order, out_order, mask=mask, nodes=nodes, normalize=normalize)
            return jnp.sum(jnp.square(found)), found

        return jax.grad(loss, has_aux=True)(x)

    gradient, found = both(wide, jnp.asarray(mask), None)
    expected_gradient, expected = both(x, None, 3)
    np.testing.assert_allclose(np.asarray(found)[out_places] if out_order else found, expected, atol=1e-5)
    if out_order:
        assert not np.delete(np.asarray(found), np.flatnonzero(mask), axis=0).any()
    if order:
        np.testing.assert_allclose(np.asarray(gradient)[places], expected_gradient, atol=1e-4)
        assert not np.delete(np.asarray(gradient), np.flatnonzero(mask), axis=0).any()


@pytest.mark.slow
def test_means_do_not_grow_with_the_graph():
    kernel = jnp.ones((15, 1, 1))
    found = [permutation_map(jnp.ones((size, size, 1)), kernel, 2, 2)[0, 1, 0] for size in (4, 8, 16)]
    # Maps onto the diagonal leave (0, 1) alone: what is summed over the diagonal is 1 / n of the whole.
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    sums = [permutation_map(jnp.ones((size, size, 1)), kernel, 2, 2, normalize=False)[0, 1, 0] for size in (4, 8)]
    assert sums[1] > 1.5 * sums[0]


def test_half_precision_sums_in_float32():
    x = jnp.full((1000, 1), 0.1, jnp.bfloat16)
    found = permutation_map(x, jnp.ones((1, 1, 1), jnp.bfloat16), 1, 0, normalize=False)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(found[0]), 100.1, rtol=1e-2)


@pytest.mark.usefixtures("untyped")
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="order=3 and out_order=1 must each be 0, 1 or 2"):
        map_count(3, 1)
    with pytest.raises(ValueError, match=r"kernel of shape \(2, 1, 1\) must be \(15, 1, out_features\)"):
        permutation_map(jnp.ones((3, 3, 1)), jnp.ones((2, 1, 1)), 2, 2)
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) must be \(3,\)"):
        permutation_map(jnp.ones((3, 1)), jnp.ones((2, 1, 1)), 1, 1, mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="needs the number of nodes"):
        permutation_map(jnp.ones((3, 1)), jnp.ones((1, 1, 1)), 0, 1)
    with pytest.raises(ValueError, match="two equal axes of nodes"):
        permutation_map(jnp.ones((3, 4, 1)), jnp.ones((2, 1, 1)), 2, 0)
    with pytest.raises(ValueError, match=r"needs order=2 axes"):
        permutation_map(jnp.ones((3, 1)), jnp.ones((2, 1, 1)), 2, 0)
    assert node_mask(jnp.asarray([True, False]), 2).tolist() == [[True, False], [False, False]]

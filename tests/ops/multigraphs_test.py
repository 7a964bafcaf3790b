"""Multigraphs: isomorphism, the polynomials by brute force, the dimension of the basis, and counts of subgraphs."""

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.geometry.groups import Symmetric
from jaxlayers.ops.multigraphs import (
    Multigraph,
    automorphisms,
    beyond_matrix_products,
    canonical,
    check_simple,
    complete,
    contraction,
    cycle,
    distinct_expansion,
    evaluate,
    multigraphs,
    polynomial_features,
    subgraph_counts,
    width,
)
from jaxlayers.testing import assert_equivariant

REPRESENTATIONS = ("scalar", "nodes", "adjacency")


def by_assignments(graph, x, *, distinct=False):
    """The sum over all assignments, one at a time, in float64."""
    nodes = len(x)
    out = np.zeros((nodes,) * graph.order)
    for assignment in itertools.product(range(nodes), repeat=graph.vertices):
        if distinct and len(set(assignment)) < graph.vertices:
            continue
        out[tuple(assignment[mark] for mark in graph.marks)] += math.prod(
            x[assignment[a], assignment[b], c] for a, b, c in graph.edges
        )
    return out


def random_graph(rng, nodes, chance=0.5):
    upper = np.triu(rng.random((nodes, nodes)) < chance, 1)
    return (upper | upper.T).astype(np.float64)


# Isomorphism --------------------------------------------------------------------------------------------------------


def relabelled(graph, permutation, flips=()):
    edges = [(permutation[a], permutation[b], c) for a, b, c in graph.edges]
    edges = [(b, a, c) if k in flips else (a, b, c) for k, (a, b, c) in enumerate(edges)]
    return Multigraph(graph.vertices, tuple(edges), tuple(permutation[mark] for mark in graph.marks))


@pytest.mark.parametrize("directed", [True, False])
def test_isomorphic_graphs_have_one_canonical_form(directed):
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = int(rng.integers(2, 8))
        edges = tuple(
            (int(a), int(b), int(c)) for a, b, c in rng.integers(0, [size, size, 2], (int(rng.integers(9)), 3))
        )
        graph = Multigraph(size, edges, tuple(int(v) for v in rng.integers(0, size, rng.integers(3))))
        flips = () if directed else set(np.flatnonzero(rng.random(len(edges)) < 0.5).tolist())
        other = relabelled(graph, rng.permutation(size).tolist(), flips)
        assert canonical(graph, directed=directed) == canonical(other, directed=directed)
        assert canonical(canonical(graph, directed=directed), directed=directed) == canonical(graph, directed=directed)


def test_enumeration_equals_brute_force():
    """All ways to place two directed edges, up to every permutation of the unmarked vertices."""
    for order, marks in ((0, ()), (1, (0,)), (2, (0, 1)), (2, (0, 0))):
        fixed = len(set(marks))
        size = fixed + 4
        images = [(*range(fixed), *rest) for rest in itertools.permutations(range(fixed, size))]
        forms = set()
        for edges in itertools.combinations_with_replacement(itertools.product(range(size), repeat=2), 2):
            forms.add(min(tuple(sorted((image[a], image[b]) for a, b in edges)) for image in images))
        found = [h for h in multigraphs(2, order) if h.degree == 2 and len(set(h.marks)) == fixed]
        assert len(found) == len(forms)


def test_connected_simple_graphs_are_as_many_as_known():
    # By edges, OEIS A002905.
    counts = Counter(h.degree for h in multigraphs(6, 0, directed=False, simple=True, connected=True))
    assert [counts[degree] for degree in range(7)] == [1, 1, 1, 3, 5, 12, 30]


# The polynomials ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_contractions_equal_the_sum_over_assignments(order):
    x = np.random.default_rng(order).normal(size=(3, 3, 2))
    graphs = multigraphs(2, order, channels=2)
    chosen = [graphs[k] for k in np.random.default_rng(0).choice(len(graphs), 40, replace=False)]
    with jax.enable_x64(True):
        for graph in (*graphs[:3], *chosen):
            found = evaluate(graph, jnp.asarray(x))
            np.testing.assert_allclose(found, by_assignments(graph, x), rtol=1e-12, atol=1e-12, err_msg=str(graph))
            mean = evaluate(graph, jnp.asarray(x), normalize=True)
            np.testing.assert_allclose(mean * 3.0 ** (graph.vertices - len(set(graph.marks))), found, atol=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_permuting_the_graph_permutes_the_polynomials(order):
    x = np.random.default_rng(3).normal(size=(2, 5, 5)).astype(np.float32)
    graphs = [h for h in multigraphs(2, order) if h.degree == 2]
    if order == 1:
        outputs = ["set"]
        fn = jax.jit(lambda x: [polynomial_features(graphs, x[..., None])])
    else:
        outputs = ["scalar" if order == 0 else "edges"]
        fn = jax.jit(lambda x: [polynomial_features(graphs, x[..., None])])
    assert_equivariant(fn, Symmetric(5), x, representations=("adjacency",), output=outputs)
    with pytest.raises(AssertionError):  # the control: a weight that depends on the index
        assert_equivariant(
            lambda x: fn(x * jnp.arange(1.0, 6.0)), Symmetric(5), x, representations=("adjacency",), output=outputs
        )


def dimension(nodes, degree, order, *, channels=1, symmetric=False):
    """Dimension of the homogeneous equivariant polynomials, from the characters of the group, one permutation a class.

    The symmetric power has the character sum over cycle types of prod_k chi(g^k)^(m_k) / (k^(m_k) m_k!).
    """
    total = 0.0
    for permutation in itertools.permutations(range(nodes)):
        power, traces = list(range(nodes)), []
        for _ in range(degree):
            power = [permutation[i] for i in power]
            fixed = sum(i == j for i, j in enumerate(power))
            swapped = sum(power[j] == i for i, j in enumerate(power) if i != j) // 2
            pairs = fixed + fixed * (fixed - 1) // 2 + swapped if symmetric else fixed**2
            traces.append(channels * pairs)
        fixed = sum(i == j for i, j in enumerate(permutation))
        # h_d from the power sums p_k = traces[k - 1], by Newton's identity.
        h = [1.0]
        for d in range(1, degree + 1):
            h.append(sum(traces[k - 1] * h[d - k] for k in range(1, d + 1)) / d)
        total += h[degree] * fixed**order
    return round(total / math.factorial(nodes))


@pytest.mark.parametrize(
    ("nodes", "degree", "order", "channels", "symmetric"),
    [
        (4, 1, 2, 1, False),
        (4, 1, 1, 1, False),
        (4, 1, 0, 1, False),
        (6, 2, 2, 1, False),
        (5, 2, 1, 2, False),
        (6, 3, 0, 1, False),
        (6, 2, 2, 1, True),
        (7, 3, 1, 1, True),
        (3, 2, 2, 1, False),
        (2, 3, 2, 1, False),
        (3, 3, 1, 1, True),
    ],
)
def test_basis_has_the_dimension_of_the_space(nodes, degree, order, channels, symmetric):
    found = multigraphs(degree, order, directed=not symmetric, channels=channels, max_vertices=nodes)
    expected = dimension(nodes, degree, order, channels=channels, symmetric=symmetric)
    assert sum(h.degree == degree for h in found) == expected
    if (degree, nodes) == (1, 4):
        assert expected == {2: 15, 1: 5, 0: 2}[order]


@pytest.mark.parametrize(("nodes", "degree", "order"), [(3, 2, 1), (2, 3, 0), (3, 1, 2)])
def test_polynomials_of_few_vertices_are_independent_on_few_nodes(nodes, degree, order):
    graphs = multigraphs(degree, order, max_vertices=nodes)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(len(graphs), nodes, nodes, 1)))
        values = np.asarray(polynomial_features(graphs, x)).reshape(-1, len(graphs))
    assert np.linalg.matrix_rank(values) == len(graphs)
    # The control: larger multigraphs say nothing new on so few nodes.
    more = multigraphs(degree, order)
    assert len(more) > len(graphs)
    with jax.enable_x64(True):
        values = np.asarray(polynomial_features(more, x)).reshape(-1, len(more))
    assert np.linalg.matrix_rank(values, tol=1e-8 * np.abs(values).max()) == len(graphs)


def test_paths_are_found_once_and_save_work():
    contraction.cache_clear()
    graph = cycle(6)
    for _ in range(3):
        evaluate(graph, jnp.ones((2, 7, 7, 1)))
    info = contraction.cache_info()
    assert (info.misses, info.hits) == (1, 2)
    assert contraction(graph, 30).scale == 3  # products of matrices, not n^6
    assert contraction(graph, 30).flops < 20 * 30**3


def test_width_is_that_of_the_best_order():
    path = Multigraph(5, tuple((i, i + 1, 0) for i in range(4)))
    assert [width(h) for h in (path, cycle(6), complete(4), complete(5))] == [1, 2, 3, 4]
    # Marked vertices stay: the ends of a path are joined by its inner vertices in turn.
    assert width(path._replace(marks=(0, 4))) == 2
    assert width(path._replace(marks=(0,))) == 1
    grid = Multigraph(9, tuple((i, j, 0) for i in range(9) for j in (i + 1, i + 3) if j < 9 and (j % 3 or j > i + 1)))
    assert width(grid) == 3


@pytest.mark.slow
def test_polynomials_beyond_matrix_products_are_those_of_the_reference():
    with np.load("tests/golden/graph_polynomials_parity.npz") as golden:
        adjacency = golden["beyond/adjacency"]
        expected = [golden[f"beyond/{order}"] for order in range(3)]
    found = beyond_matrix_products(6)
    assert Counter((h.degree, h.order) for h in found) == {(5, 2): 1, (6, 0): 1, (6, 1): 1, (6, 2): 9}
    for order in range(3):
        values = [evaluate(h, jnp.asarray(adjacency, jnp.float32)[..., None]) for h in found if h.order == order]
        rows = sorted(np.sort(np.ravel(value)).tolist() for value in values)
        np.testing.assert_array_equal(rows, expected[order])


# Counting -----------------------------------------------------------------------------------------------------------


def by_subsets(adjacency, graph):
    """Occurrences of a simple unmarked graph: all injective assignments over its automorphisms."""
    return by_assignments(graph, adjacency[..., None], distinct=True) / automorphisms(graph)


def test_formulas_of_short_cycles_have_the_known_integers():
    """8 C_4 = tr A^4 - 2 sum d^2 + sum d, and the number of terms of the longer ones."""
    star, edge = Multigraph(3, ((0, 1, 0), (0, 2, 0))), Multigraph(2, ((0, 1, 0),))
    assert distinct_expansion(cycle(3), simple=True) == {cycle(3): 1}
    expansion = distinct_expansion(cycle(4), simple=True)
    assert expansion == {cycle(4): 1, canonical(star, directed=False): -2, canonical(edge, directed=False): 1}
    assert [len(distinct_expansion(cycle(k), simple=True)) for k in (5, 6)] == [3, 10]
    assert [automorphisms(cycle(k)) for k in (3, 4, 5, 6)] == [6, 8, 10, 12]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_cycles_are_counted_as_by_brute_force(length, order):
    adjacency = random_graph(np.random.default_rng(length), 6, 0.6)
    graph = cycle(length, order)
    found = subgraph_counts(graph, jnp.asarray(adjacency, jnp.float32))
    expected = by_subsets(adjacency, graph)
    np.testing.assert_array_equal(found, expected)
    if order:  # each cycle is seen at each of its nodes, and at each end of its edges
        total = by_subsets(adjacency, cycle(length))
        assert expected.sum() == total * length * (1 if order == 1 else 2)


def test_distinct_sums_of_directed_graphs_with_loops():
    x = np.random.default_rng(5).normal(size=(4, 4, 1))
    graph = Multigraph(4, ((0, 1, 0), (1, 2, 0), (2, 2, 0), (3, 0, 0)), (0, 2))
    with jax.enable_x64(True):
        found = sum(a * evaluate(h, jnp.asarray(x)) for h, a in distinct_expansion(graph).items())
    np.testing.assert_allclose(found, by_assignments(graph, x, distinct=True), atol=1e-12)


def test_padding_is_not_counted():
    adjacency = random_graph(np.random.default_rng(0), 6, 0.7)
    wide = np.ones((9, 9))
    wide[:6, :6] = adjacency
    mask = jnp.arange(9) < 6
    for graph in (cycle(5), complete(4), cycle(4, 1), cycle(4, 2)):
        found = np.asarray(subgraph_counts(graph, jnp.asarray(wide, jnp.float32), mask=mask))
        inside = (slice(6),) * graph.order
        np.testing.assert_array_equal(found[inside], subgraph_counts(graph, jnp.asarray(adjacency, jnp.float32)))
        assert found.sum() == found[inside].sum()
    every = [h for h in multigraphs(1, 2) if not np.isfinite(evaluate(h, jnp.full((3, 3, 1), jnp.nan))).all()]
    for graph in every:
        x = jnp.full((3, 3, 1), jnp.nan).at[:2, :2].set(1.0)
        found = evaluate(graph, x, mask=jnp.arange(3) < 2)
        np.testing.assert_array_equal(found[:2, :2], evaluate(graph, jnp.ones((2, 2, 1))))
        assert not np.asarray(found)[2].any()
        assert not np.asarray(found)[:, 2].any()


@pytest.mark.usefixtures("untyped")
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"must be symmetric, as a simple|must be symmetric"):
        check_simple(jnp.triu(jnp.ones((3, 3)), 1))
    with pytest.raises(ValueError, match="of zeros and ones and zero on the diagonal"):
        subgraph_counts(cycle(3), jnp.full((3, 3), 0.5))
    with pytest.raises(ValueError, match=r"edges of shape \(3, 4, 1\) must be"):
        evaluate(cycle(3), jnp.ones((3, 4, 1)))
    with pytest.raises(ValueError, match="have 1 channels, too few"):
        evaluate(Multigraph(2, ((0, 1, 1),)), jnp.ones((3, 3, 1)))
    with pytest.raises(ValueError, match=r"mask of shape \(2,\) must be \(3,\)"):
        evaluate(cycle(3), jnp.ones((3, 3, 1)), mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="degree=-1 must not be negative"):
        multigraphs(-1, 0)
    with pytest.raises(ValueError, match="length=2 must be at least 3"):
        cycle(2)
    with pytest.raises(ValueError, match=r"graphs must be some, all of one order"):
        polynomial_features([cycle(3), cycle(3, 1)], jnp.ones((3, 3, 1)))

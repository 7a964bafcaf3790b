"""Sparse transforms against float64 twins, their optimality conditions, margins, derivatives and stored outputs."""

import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.multi_head import attention_weights
from jaxlayers.ops.entmax import (
    entmax,
    entmax15,
    fenchel_young_loss,
    k_subsets,
    k_subsets_conjugate,
    norm_conjugate,
    norm_entropy,
    norm_negentropy,
    normmax,
    sparsemax,
    subset_entropy,
    tsallis_conjugate,
    tsallis_entropy,
    tsallis_negentropy,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fenchel_young_parity.npz")

# Name, entropy, and parameter of the twin.
ENTROPIES = {
    "softmax": (tsallis_entropy(1), ("tsallis", 1.0)),
    "entmax_1.2": (tsallis_entropy(1.2), ("tsallis", 1.2)),
    "entmax15": (tsallis_entropy(1.5), ("tsallis", 1.5)),
    "sparsemax": (tsallis_entropy(2), ("tsallis", 2.0)),
    "entmax_3": (tsallis_entropy(3.0), ("tsallis", 3.0)),
    "normmax_2": (norm_entropy(2), ("norm", 2.0)),
    "normmax_5": (norm_entropy(5), ("norm", 5.0)),
    "subsets_3": (subset_entropy(3), ("subsets", 3)),
}
TRANSFORMS = {name: jax.jit(entropy.transform) for name, (entropy, _) in ENTROPIES.items()}
# Beside another of their kind, for the extended suite.
LATER = ("entmax_3", "normmax_5")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in ENTROPIES]
every = pytest.mark.parametrize("name", NAMES)
sparse = pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("softmax",)])
bisected = jax.jit(lambda z, alpha: entmax(z, alpha=alpha))


# The twins: one row at a time, in float64. ----------------------------------------------------------------------------


def bisect(excess, low, high):
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle)
    return low


def twin_tsallis(z, alpha):
    z = z - z.max()
    if alpha == 1:
        return np.exp(z) / np.exp(z).sum()
    scaled = (alpha - 1) * z

    def weights(tau):
        return np.maximum(scaled - tau, 0) ** (1 / (alpha - 1))

    p = weights(bisect(lambda tau: weights(tau).sum() - 1, -1.0, 0.0))
    return p / p.sum()


def twin_norm(z, gamma):
    z = z - z.max()
    tau = bisect(lambda tau: (np.maximum(z - tau, 0) ** (gamma / (gamma - 1))).sum() - 1, -1.0, 0.0)
    p = np.maximum(z - tau, 0) ** (1 / (gamma - 1))
    return p / p.sum()


def twin_subsets(z, k):
    """Quadratic programming by brute force: every number of full and of free entries, in the order of the logits."""
    if len(z) <= k:
        return np.ones(len(z))
    order, best = np.argsort(-z), None
    for full in range(k + 1):
        for free in range(0 if full == k else 1, len(z) - full + 1):
            p = np.zeros(len(z))
            p[order[:full]] = 1
            inner = order[full : full + free]
            p[inner] = z[inner] - (z[inner].sum() + full - k) / max(free, 1)
            if p.min() >= 0 and p.max() <= 1 and (best is None or ((p - z) ** 2).sum() < ((best - z) ** 2).sum()):
                best = p
    return best


TWINS = {"tsallis": twin_tsallis, "norm": twin_norm, "subsets": twin_subsets}


def twin(name, z, allowed=None):
    kind, parameter = ENTROPIES[name][1]
    z = np.asarray(z, np.float64)
    allowed = np.ones(len(z), bool) if allowed is None else allowed
    p = np.zeros(len(z))
    if allowed.any():
        p[allowed] = TWINS[kind](z[allowed], parameter)
    return p


def draw(rng, rows=60, choices=9):
    """Logits of many spreads, from nearly equal to one far above the others, some of them tied."""
    z = rng.normal(size=(rows, choices)) * np.geomspace(0.01, 20, rows)[:, None]
    z[::5, 1] = z[::5, 0]
    return z.astype(np.float32)


@every
def test_weights_equal_the_twin(name, rng):
    z = draw(rng)
    mask = rng.random(z.shape) < 0.7
    mask[3] = False
    expected = np.stack([twin(name, row) for row in z])
    # The square root of entmax_3 magnifies the rounding of what is nearly zero.
    tolerance = 1e-3 if name == "entmax_3" else 2e-6
    np.testing.assert_allclose(TRANSFORMS[name](z), expected, atol=tolerance)
    expected = np.stack([twin(name, row, allowed) for row, allowed in zip(z, mask, strict=True)])
    np.testing.assert_allclose(TRANSFORMS[name](z, mask=jnp.asarray(mask)), expected, atol=tolerance)


@every
def test_weights_are_exact_to_the_precision_of_float64(name, rng):
    z = draw(rng, rows=20).astype(np.float64)
    with jax.enable_x64(True):
        found = np.asarray(TRANSFORMS[name](z))
    assert found.dtype == np.float64
    expected = np.stack([twin(name, row) for row in z])
    np.testing.assert_allclose(found, expected, atol=1e-7 if name == "entmax_3" else 1e-13)


@every
def test_weights_sum_to_the_total_and_lie_in_their_set(name, rng):
    z, total = draw(rng, rows=500), ENTROPIES[name][0].total
    p = np.asarray(TRANSFORMS[name](z), np.float64)
    assert p.min() >= 0
    assert p.max() <= 1 + 1e-6
    np.testing.assert_allclose(p.sum(axis=-1), total, atol=1e-6 * total)


def violation(name, z, p):
    """How far p is from the conditions that the gradient of Omega differs from z by a constant, less outside."""
    kind, parameter = ENTROPIES[name][1]
    if kind == "norm":
        slope = (p / np.linalg.norm(p, parameter)) ** (parameter - 1)
    elif parameter == 1 and kind == "tsallis":
        slope = np.log(p)
    else:
        power = parameter - 1 if kind == "tsallis" else 1
        slope = p**power / power
    rest, top = z - slope, ENTROPIES[name][0].total > 1
    inner = (p > 1e-5) & (p < 1 - 1e-5) if top else p > 1e-5
    outer, full = p == 0, (p == 1) & top
    if not inner.any():
        return max(rest[outer].max(initial=-np.inf) - rest[full].min(initial=np.inf), 0)
    level = rest[inner].mean()
    above = rest[outer].max(initial=level) - level
    return max(np.abs(rest[inner] - level).max(), above, level - rest[full].min(initial=level))


@every
def test_weights_satisfy_the_optimality_conditions(name, rng):
    z = draw(rng, rows=400)[:200]  # spreads up to about 0.5, so that most choices have weight
    p = np.asarray(TRANSFORMS[name](z), np.float64)
    worst = max(violation(name, *pair) for pair in zip(z, p, strict=True))
    assert worst < 2e-4
    # Weights of slightly different logits do not satisfy them.
    other = np.asarray(TRANSFORMS[name](z * np.linspace(0.9, 1.1, 9, dtype=np.float32)), np.float64)
    assert max(violation(name, *pair) for pair in zip(z, other, strict=True)) > 0.01


@every
def test_conjugate_is_the_largest_value_of_its_maximum(name, rng):
    entropy, z = ENTROPIES[name][0], draw(rng, rows=30)
    p = TRANSFORMS[name](z)
    value = jnp.sum(p * z, axis=-1) - entropy.negentropy(p)
    found = np.asarray(jax.jit(entropy.conjugate)(z))
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)
    others = rng.permuted(np.repeat(np.asarray(p)[:, None], 200, axis=1), axis=-1)
    near = 0.9 * np.asarray(p)[:, None] + 0.1 * others  # in the same convex set
    values = np.sum(near * z[:, None], axis=-1) - entropy.negentropy(jnp.asarray(near))
    assert np.all(values <= found[:, None] + 1e-4)
    if name == "softmax":
        np.testing.assert_allclose(found, jax.nn.logsumexp(z, axis=-1), rtol=1e-6, atol=1e-6)


# Masks and degenerate rows. -------------------------------------------------------------------------------------------


@every
def test_masks_mean_what_they_mean_in_attention(name, rng):
    z = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    for shape in ((1, 5), (4, 5), (3, 1, 5), (2, 1, 4, 5), (4, 1)):
        mask = jnp.asarray(rng.random(shape) < 0.6)
        weights, attention = TRANSFORMS[name](z, mask=mask), attention_weights(z, mask=mask)
        assert weights.shape == attention.shape
        assert weights.dtype == attention.dtype
        assert jnp.all(weights[attention == 0] == 0)
        np.testing.assert_array_equal(jnp.sum(weights, axis=-1) > 0, jnp.sum(attention, axis=-1) > 0)
    if name == "softmax":
        np.testing.assert_allclose(weights, attention, atol=1e-7)


@every
def test_masked_choices_count_as_absent(name, rng):
    z = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    mask = jnp.asarray([True, False, True, True, False, True, True])
    kept = TRANSFORMS[name](z[:, np.asarray(mask)])
    np.testing.assert_allclose(TRANSFORMS[name](z, mask=mask)[:, np.asarray(mask)], kept, atol=1e-6)
    infinite = jnp.where(mask, z, -jnp.inf)
    np.testing.assert_array_equal(TRANSFORMS[name](infinite), TRANSFORMS[name](z, mask=mask))
    entropy = ENTROPIES[name][0]
    conjugate = entropy.conjugate(z[:, np.asarray(mask)])
    np.testing.assert_allclose(entropy.conjugate(z, mask=mask), conjugate, atol=1e-6)


@every
def test_rows_that_may_choose_nothing_are_zero_with_zero_gradient(name):
    entropy, z = ENTROPIES[name][0], jnp.asarray([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -1.0, 5.0]])
    mask = jnp.asarray([[False] * 4, [True] * 4])

    def loss(z):
        weights, conjugate = entropy.transform(z, mask=mask), entropy.conjugate(z, mask=mask)
        return jnp.sum(jnp.square(weights)) + jnp.sum(conjugate), (weights, conjugate)

    gradient, (weights, conjugate) = jax.jit(jax.grad(loss, has_aux=True))(z)
    assert np.all(weights[0] == 0)
    assert conjugate[0] == -entropy.negentropy(jnp.zeros(4))
    assert np.all(gradient[0] == 0)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient[1] != 0)


@every
def test_no_choices_give_no_weights(name):
    assert ENTROPIES[name][0].transform(jnp.zeros((3, 0))).shape == (3, 0)


@every
def test_invalid_logits_are_not_hidden(name):
    assert np.all(np.isnan(TRANSFORMS[name](jnp.asarray([[1.0, jnp.nan, 0.0, 2.0, 1.0]])))) or name == "subsets_3"
    assert np.any(np.isnan(TRANSFORMS[name](jnp.asarray([[1.0, jnp.nan, 0.0, 2.0, 1.0]]))))


@every
def test_adding_a_number_to_a_row_changes_nothing(name, rng):
    # Multiples of 1/64, so that the shifted logits are the same numbers.
    z = jnp.asarray(np.round(64 * rng.normal(size=(50, 9))) / 64, jnp.float32)
    for shift in (-4096.0, 3.0, 1024.0):
        np.testing.assert_array_equal(TRANSFORMS[name](z + shift), TRANSFORMS[name](z))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every
def test_half_precision_is_finite_and_as_good_as_its_logits(name, dtype, rng):
    for scale in (1e-3, 1.0, 100.0, 3e4):
        z = jnp.asarray(np.clip(scale * rng.normal(size=(20, 9)), -6e4, 6e4), dtype)
        p = TRANSFORMS[name](z)
        assert p.dtype == dtype
        assert np.all(np.isfinite(np.asarray(p, np.float32)))
        full = TRANSFORMS[name](z.astype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(p), np.asarray(full.astype(dtype)))
    entropy = ENTROPIES[name][0]
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(entropy.transform(z))).astype(jnp.float32)))(z)
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


# Limits. --------------------------------------------------------------------------------------------------------------


def test_alpha_one_is_softmax_and_is_approached(rng):
    z = jnp.asarray(draw(rng))
    softmax = jax.nn.softmax(z, axis=-1)
    np.testing.assert_allclose(bisected(z, 1.0), softmax, atol=1e-6)
    np.testing.assert_array_equal(entmax(z, alpha=1), softmax)
    distances = [float(jnp.abs(bisected(z, 1 + excess) - softmax).max()) for excess in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert all(small < 0.2 * large for large, small in itertools.pairwise(distances))
    assert distances[-1] < 1e-3


def test_bisection_equals_the_exact_transforms_at_their_alpha(rng):
    z = jnp.asarray(draw(rng))
    np.testing.assert_allclose(bisected(z, 2.0), sparsemax(z), atol=1e-6)
    np.testing.assert_allclose(bisected(z, 1.5), entmax15(z), atol=1e-6)
    np.testing.assert_array_equal(entmax(z, alpha=2), sparsemax(z))
    np.testing.assert_array_equal(entmax(z, alpha=1.5), entmax15(z))
    assert jnp.abs(bisected(z, 1.9) - sparsemax(z)).max() > 0.01


def test_subsets_of_one_are_sparsemax_and_of_all_are_everything(rng):
    z = jnp.asarray(draw(rng))
    np.testing.assert_allclose(k_subsets(z, k=1), sparsemax(z), atol=1e-6)
    np.testing.assert_array_equal(k_subsets(z, k=9), np.ones_like(z))
    np.testing.assert_array_equal(k_subsets(z, k=12), np.ones_like(z))
    mask = jnp.arange(9) < 3
    for k in (3, 4):
        np.testing.assert_array_equal(k_subsets(z, k=k, mask=mask), np.broadcast_to(mask, z.shape))


def test_large_orders_of_the_norm_spread_evenly_and_small_ones_choose_one(rng):
    z = jnp.asarray(rng.normal(size=(50, 9)), jnp.float32)
    p = np.asarray(normmax(z, gamma=500.0))
    shares = np.where(p > 0, p * np.sum(p > 0, axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(shares, 1, atol=0.05)
    assert np.mean(np.sum(p > 0, axis=-1)) > 1.5
    clear = np.diff(np.sort(z, axis=-1)[:, -2:], axis=-1)[:, 0] > 0.1
    chosen = np.max(normmax(z, gamma=1.01), axis=-1)
    np.testing.assert_allclose(chosen[clear], 1, atol=1e-4)


def test_alpha_may_differ_between_rows(rng):
    z, alphas = jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32), jnp.asarray([1.0, 1.5, 2.0])
    found = entmax(z, alpha=alphas)
    for index, alpha in enumerate((1, 1.5, 2)):
        np.testing.assert_allclose(found[:, index], entmax(z[:, index], alpha=alpha), atol=1e-6)
    entropy = tsallis_entropy(alphas)
    np.testing.assert_allclose(entropy.conjugate(z)[:, 2], tsallis_conjugate(z[:, 2], alpha=2), atol=1e-5)


def test_choices_may_be_many(rng):
    z = rng.normal(size=(1, 200_000)).astype(np.float32)
    for scale in (1e-4, 0.01, 1.0):
        scaled = jnp.float32(scale) * z
        for name, fn in (
            ("sparsemax", sparsemax),
            ("entmax15", entmax15),
            ("subsets_3", jax.jit(TRANSFORMS["subsets_3"])),
        ):
            if name == "subsets_3":
                found, expected = fn(scaled)[0], None
                assert np.asarray(found).sum(dtype=np.float64) == pytest.approx(3, abs=1e-3)
            else:
                found, expected = np.asarray(fn(scaled)[0]), twin(name, np.asarray(scaled[0]))
                np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())
                assert found.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)


@every
def test_jit_vmap_and_leading_axes_are_equal(name, rng):
    fn = ENTROPIES[name][0].transform
    z = jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32)
    whole = TRANSFORMS[name](z)
    np.testing.assert_allclose(jax.vmap(jax.vmap(fn))(z), whole, atol=1e-6)
    np.testing.assert_allclose(fn(z), whole, atol=1e-6)


# Margins. -------------------------------------------------------------------------------------------------------------


def gaps(rng, count, choices, order):
    """Logits on a grid of 1/1024, so that the gap between the `order`-th and the next largest is exact."""
    z = np.round(1024 * rng.normal(size=(count, choices)) * rng.uniform(0.2, 4, size=(count, 1))) / 1024
    ordered = -np.sort(-z, axis=-1)
    return z.astype(np.float32), ordered[:, order - 1] - ordered[:, order]


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("entmax15", 2.0),
        ("sparsemax", 1.0),
        ("entmax_3", 0.5),
        ("normmax_2", 1.0),
        ("normmax_5", 1.0),
        ("subsets_3", 1.0),
    ],
)
def test_weights_are_exactly_binary_if_and_only_if_the_gap_reaches_the_margin(name, margin, rng):
    entropy = ENTROPIES[name][0]
    assert entropy.margin == margin
    z, gap = gaps(rng, 5000, 6, entropy.total)
    z[:500] += (margin - gap[:500, None]) * (z[:500] >= np.sort(z[:500], axis=-1)[:, [-entropy.total]])  # at the margin
    ordered = -np.sort(-z, axis=-1)
    gap = ordered[:, entropy.total - 1] - ordered[:, entropy.total]
    p = np.asarray(TRANSFORMS[name](z))
    binary = np.all((p == 0) | (p == 1), axis=-1)
    assert np.sum(gap == margin) >= 400
    assert np.sum(binary != (gap >= margin)) == 0
    assert 500 < np.sum(binary) < 4500
    # Neither a smaller nor a larger margin is true.
    assert np.sum(binary != (gap >= 0.9 * margin)) > 20
    assert np.sum(binary != (gap >= 1.1 * margin)) > 20


def test_softmax_has_no_margin():
    assert tsallis_entropy(1).margin == math.inf
    p = jax.nn.softmax(jnp.asarray([10.0, 0.0]))
    assert 0 < p[1] < p[0] < 1


# Derivatives. ---------------------------------------------------------------------------------------------------------


def away_from_kinks(name, rng, rows=3, choices=6):
    """Rows whose support stays as it is while the logits move by 0.05."""
    found, scale = [], 3.0 if name == "entmax_1.2" else 1.0
    while len(found) < rows:
        z = scale * rng.normal(size=choices)
        support = [twin(name, z + step) for step in 0.05 * np.concatenate([np.eye(choices), -np.eye(choices)])]
        same = all(np.array_equal(p > 0, support[0] > 0) and np.array_equal(p == 1, support[0] == 1) for p in support)
        fewest = 4 if name == "subsets_3" else 3
        if same and fewest <= np.sum(support[0] > 0) and (name == "softmax" or np.any(support[0] == 0)):
            found.append(z)
    return np.stack(found)


WEIGH = np.linspace(-1, 2, 6) ** 3


@functools.cache
def jets(name):
    """Weights, Jacobians in both modes, and gradients and Hessians of two scalars; rows at once, compiled once."""
    entropy = ENTROPIES[name][0]

    def jet(z):
        def scalar(z):
            return jnp.sum(WEIGH * entropy.transform(z))

        return {
            "weights": entropy.transform(z),
            "forward": jax.jacfwd(entropy.transform)(z),
            "reverse": jax.jacrev(entropy.transform)(z),
            "gradient": jax.grad(scalar)(z),
            "hessian": jax.jacfwd(jax.grad(scalar))(z),
            "hessian_reverse": jax.jacrev(jax.grad(scalar))(z),
            "conjugate": entropy.conjugate(z),
            "conjugate_gradient": jax.grad(entropy.conjugate)(z),
            "conjugate_hessian": jax.jacfwd(jax.grad(entropy.conjugate))(z),
        }

    return jax.jit(jax.vmap(jet))


def with_differences(fn, z, step=1e-5):
    """Return the outputs of `fn` at the rows z, and their central differences along each entry of z, which go last."""
    rows, width = z.shape
    shifted = (z[:, None] + step * np.concatenate([np.eye(width), -np.eye(width)])).reshape(-1, width)
    outputs = jax.device_get(fn(np.concatenate([z, shifted])))  # in one call, compiled for one shape

    def slope(a):
        higher, lower = np.moveaxis(a[rows:].reshape(rows, 2, width, *a.shape[1:]), 1, 0)
        return np.moveaxis((higher - lower) / (2 * step), 1, -1)

    return jax.tree.map(lambda a: a[:rows], outputs), jax.tree.map(slope, outputs)


@every
def test_derivatives_agree_with_differences_in_both_modes_and_twice(name, rng):
    z = away_from_kinks(name, rng)
    with jax.enable_x64(True):
        found, slopes = with_differences(jets(name), z)
    assert np.abs(found["forward"]).max() > 0.1
    for derivative, value in (
        ("forward", "weights"),
        ("reverse", "weights"),
        ("hessian", "gradient"),
        ("hessian_reverse", "gradient"),
        ("conjugate_gradient", "conjugate"),
        ("conjugate_hessian", "conjugate_gradient"),
    ):
        np.testing.assert_allclose(found[derivative], slopes[value], atol=1e-6 * (1 + np.abs(slopes[value]).max()))
    np.testing.assert_allclose(found["conjugate_gradient"], found["weights"], atol=1e-12)
    if name in ("sparsemax", "subsets_3"):
        assert np.all(found["hessian"] == 0)
    else:
        assert np.abs(found["hessian"]).max() > 0.01


def test_derivatives_with_respect_to_alpha_agree_with_differences(rng):
    z = 0.4 * rng.normal(size=6)  # all choices have weight

    def jet(alpha):
        def value(a):
            return entmax(jnp.asarray(z), alpha=a[0])

        def conjugate(a):
            return tsallis_conjugate(jnp.asarray(z), alpha=a[0])

        return {
            "value": value(alpha),
            "forward": jax.jacfwd(value)(alpha),
            "reverse": jax.jacrev(value)(alpha),
            "second": jax.jacfwd(jax.jacrev(value))(alpha),
            "conjugate": conjugate(alpha),
            "conjugate_slope": jax.grad(conjugate)(alpha),
        }

    with jax.enable_x64(True):
        alphas = np.asarray([[1.0], [1.0001], [1.3], [1.5], [2.0]])
        found, slopes = with_differences(jax.jit(jax.vmap(jet)), alphas, step=1e-4)
    for derivative, value in (("forward", "value"), ("reverse", "value"), ("second", "forward")):
        np.testing.assert_allclose(found[derivative], slopes[value], atol=1e-6)
        assert np.abs(found[derivative]).max(axis=tuple(range(1, found[derivative].ndim))).min() > 1e-3
    np.testing.assert_allclose(found["conjugate_slope"], slopes["conjugate"], atol=1e-6)


@every
def test_jacobian_is_symmetric_and_leaves_the_sum_alone(name, rng):
    with jax.enable_x64(True):
        jacobians = np.asarray(jets(name)(rng.normal(size=(39, 6)))["reverse"])
    largest = np.abs(jacobians).max()
    np.testing.assert_allclose(jacobians, np.swapaxes(jacobians, -1, -2), atol=1e-9 * largest)
    np.testing.assert_allclose(jacobians.sum(axis=-1), 0, atol=1e-9 * largest)
    assert np.linalg.eigvalsh(jacobians).min() > -1e-9 * largest


def test_sparsemax_jacobian_projects_on_the_support():
    p = sparsemax(jnp.asarray([0.5, 0.2, -3.0]))
    jacobian = jax.jacfwd(sparsemax)(jnp.asarray([0.5, 0.2, -3.0]))
    np.testing.assert_allclose(p, [0.65, 0.35, 0], atol=1e-6)
    np.testing.assert_allclose(jacobian, [[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]], atol=1e-6)


@every
def test_gradients_are_finite_wherever_the_weights_are(name, rng):
    z = jnp.asarray(np.concatenate([draw(rng), np.zeros((1, 9)), 1e4 * np.eye(9)]), jnp.float32)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(jnp.arange(9) * ENTROPIES[name][0].transform(z))))(z)
    assert np.all(np.isfinite(gradient))


# Losses and entropies. ------------------------------------------------------------------------------------------------


@every
def test_loss_is_never_negative_and_its_gradient_is_the_difference_of_the_weights(name, rng):
    entropy, z = ENTROPIES[name][0], jnp.asarray(draw(rng))
    target = jnp.asarray(np.roll(np.asarray(TRANSFORMS[name](z)), 1, axis=0))
    loss = jax.jit(functools.partial(fenchel_young_loss, entropy=entropy))
    assert np.min(loss(z, target)) > -1e-5
    np.testing.assert_allclose(loss(z, TRANSFORMS[name](z)), 0, atol=2e-5)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(loss(z, target))))(z)
    np.testing.assert_allclose(gradient, TRANSFORMS[name](z) - target, atol=1e-5)


@sparse
def test_loss_of_a_vertex_is_zero_exactly_from_the_margin_on(name, rng):
    entropy, total = ENTROPIES[name][0], ENTROPIES[name][0].total
    z, _ = gaps(rng, 2000, 6, total)
    order = np.argsort(-z, axis=-1)
    target = np.zeros_like(z)
    np.put_along_axis(target, order[:, :total], 1, axis=-1)
    ordered = np.take_along_axis(z, order, axis=-1)
    gap = ordered[:, total - 1] - ordered[:, total]
    loss = np.asarray(fenchel_young_loss(jnp.asarray(z), jnp.asarray(target), entropy=entropy))
    assert np.abs(loss[gap >= entropy.margin]).max() < 1e-6
    assert np.sum(gap >= entropy.margin) > 50
    short = gap < 0.7 * entropy.margin
    assert loss[short].min() > 1e-4 if name != "entmax_1.2" else loss[short].min() > 0


def test_loss_of_softmax_is_cross_entropy(rng):
    z, labels = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32), np.arange(8) % 5
    found = fenchel_young_loss(z, jax.nn.one_hot(labels, 5), entropy=tsallis_entropy(1))
    np.testing.assert_allclose(found, -jax.nn.log_softmax(z)[np.arange(8), labels], atol=1e-6)
    # Large equal logits do not cost digits.
    far = fenchel_young_loss(z + 2.0**12, jax.nn.one_hot(labels, 5), entropy=tsallis_entropy(1))
    np.testing.assert_allclose(far, found, atol=2e-3)


def test_negentropies(rng):
    p = rng.dirichlet(np.ones(6), size=20)
    p[0] = np.eye(6)[0]
    p32 = jnp.asarray(p, jnp.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        shannon = np.where(p > 0, p * np.log(p), 0).sum(axis=-1)
    np.testing.assert_allclose(tsallis_negentropy(p32, alpha=1), shannon, atol=1e-6)
    for alpha in (1.0001, 1.3, 1.5, 2, 3):
        expected = (p**alpha - p).sum(axis=-1) / (alpha * (alpha - 1))
        np.testing.assert_allclose(tsallis_negentropy(p32, alpha=alpha), expected, atol=1e-5)
    for gamma in (1.5, 2, 7):
        np.testing.assert_allclose(norm_negentropy(p32, gamma=gamma), np.linalg.norm(p, gamma, axis=-1) - 1, atol=1e-6)
    assert tsallis_negentropy(p32, alpha=1.7)[0] == 0


# Stored outputs of the reference code. --------------------------------------------------------------------------------

REFERENCE = {
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "normmax_2": functools.partial(normmax, gamma=2),
    "normmax_5": functools.partial(normmax, gamma=5),
    "subsets_2": functools.partial(k_subsets, k=2),
    "subsets_4": functools.partial(k_subsets, k=4),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_parity_with_the_entmax_package(name):
    z, cotangent = jnp.asarray(GOLDEN["logits"]), jnp.asarray(GOLDEN["cotangent"])
    p, pull = jax.vjp(REFERENCE[name], z)
    np.testing.assert_allclose(p, GOLDEN[name], atol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], GOLDEN[f"{name}/gradient"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.8])
def test_parity_with_bisection_of_the_entmax_package(alpha):
    z, cotangent = jnp.asarray(GOLDEN["logits"]), jnp.asarray(GOLDEN["cotangent"])
    p, pull = jax.vjp(lambda z, alpha: entmax(z, alpha=alpha), z, jnp.float32(alpha))
    np.testing.assert_allclose(p, GOLDEN[f"entmax_{alpha}"], atol=1e-6)
    z_slope, alpha_slope = pull(cotangent)
    np.testing.assert_allclose(z_slope, GOLDEN[f"entmax_{alpha}/gradient"], atol=1e-5)
    np.testing.assert_allclose(alpha_slope, GOLDEN[f"entmax_{alpha}/alpha_gradient"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "entropy"),
    [
        ("loss_1.25", tsallis_entropy(1.25)),
        ("loss_1.5", tsallis_entropy(1.5)),
        ("loss_2", tsallis_entropy(2)),
        ("loss_norm_2", norm_entropy(2)),
    ],
)
def test_parity_with_the_losses_of_the_entmax_package(name, entropy):
    found = fenchel_young_loss(jnp.asarray(GOLDEN["logits"]), jnp.asarray(GOLDEN["target"]), entropy=entropy)
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-5, atol=2e-6)


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda z: entmax(z, alpha=0.5), "alpha=0.5 must be finite and at least 1"),
        (lambda z: entmax(z, alpha=math.inf), "alpha=inf must be finite"),
        (lambda z: tsallis_conjugate(z, alpha=math.nan), "alpha=nan must be finite"),
        (lambda z: tsallis_entropy(0), "alpha=0 must be finite and at least 1"),
        (lambda z: normmax(z, gamma=1), "gamma=1 must be finite and above 1"),
        (lambda z: norm_conjugate(z, gamma=0.5), "gamma=0.5 must be"),
        (lambda z: norm_negentropy(z, gamma=math.inf), "gamma=inf must be"),
        (lambda z: norm_entropy(1.0), "gamma=1.0 must be"),
        (lambda z: k_subsets(z, k=0), "k=0 must be at least 1; set k"),
        (lambda z: k_subsets_conjugate(z, k=-1), "k=-1 must be at least 1"),
        (lambda z: subset_entropy(0), "k=0 must be at least 1"),
    ],
)
def test_wrong_parameters_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.zeros((2, 3)))

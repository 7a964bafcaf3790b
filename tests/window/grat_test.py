import functools
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window.grat import GratAttention, criss_cross, grat_attention, neighbourhood, regroup, ungroup

GOLDEN = Path(__file__).parents[1] / "golden" / "grat_parity.npz"
LAYER = GratAttention(num_heads=2, group_size=(2, 2))

CASES = (
    Case(
        name="grat_attention",
        module=LAYER,
        # A map of 5 x 4, whose last groups are half padding, and three tokens of text.
        inputs=lambda rng: (rng.normal(size=(2, 23, 8)), np.arange(3) < np.array([[3], [2]])),
        keywords={"size": (5, 4)},
        leading_axes=True,
        zero_gradients={"key/bias": "softmax does not see what all keys of a query have in common"},
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=LAYER.clone(num_heads=3)),
            BadInput(match=r"size=\(5, 4\) and group=\(2,\) must have", module=LAYER.clone(group_size=(2,))),
            BadInput(match=r"group=\(2, 0\) must have 1 to 3 positive", module=LAYER.clone(group_size=(2, 0))),
            BadInput(match="blocks_at_once=0 must be positive", module=LAYER.clone(groups_at_once=0)),
            BadInput(
                match=r"19 queries and 19 keys must be the 20 of size=\(5, 4\)",
                inputs=lambda rng: (np.ones((1, 19, 8)),),
            ),
            BadInput(
                match=r"text_mask of shape \(1, 2\) must be of the 3 tokens of text",
                inputs=lambda rng: (np.ones((1, 23, 8)), np.ones((1, 2), bool)),
            ),
            BadInput(match=r"must be \[\*batch, tokens", inputs=lambda rng: (np.ones((8,)),)),
        ),
    ),
)

wide = functools.partial(neighbourhood, radius=2)
# Maps whose groups are whole, and maps whose last ones are not, with and without text.
MAPS = [
    ((8, 6), (2, 3), 0),
    ((7, 9), (2, 4), 3),
    ((11,), (3,), 2),
    ((4, 6, 4), (2, 2, 2), 0),
    ((3, 5, 4), (2, 2, 3), 2),
]


def tokens(rng, length, heads=2, key_heads=2, batch=2):
    shapes = [(batch, length, count, 4) for count in (heads, key_heads, key_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def allowed_pairs(size, group, text, sees):
    """Return which token may attend to which, from the coordinates of each; `sees(p, q)` says it of two groups."""
    places = [tuple(a // b for a, b in zip(p, group, strict=True)) for p in itertools.product(*map(range, size))]
    length = len(places) + text
    mask = np.ones((length, length), bool)
    for row, p in enumerate(places):
        for column, q in enumerate(places):
            mask[row, column] = sees(p, q)
    return mask


def near(radius):
    return lambda p, q: all(abs(a - b) <= radius for a, b in zip(p, q, strict=True))


def crosses(p, q):
    return any(a == b for a, b in zip(p, q, strict=True))


PATTERNS = [(neighbourhood, near(1)), (wide, near(2)), (criss_cross, crosses)]


@pytest.mark.parametrize(("size", "group", "text"), MAPS)
@pytest.mark.parametrize(("blocks", "sees"), PATTERNS)
def test_it_is_dense_attention_under_the_block_mask(size, group, text, blocks, sees, rng):
    q, k, v = tokens(rng, math.prod(size) + text)
    mask = allowed_pairs(size, group, text, sees)
    text_mask = None
    allowed = np.broadcast_to(mask, (2, 1, *mask.shape)).copy()
    if text:
        text_mask = np.ones((2, text), bool)
        text_mask[1, -1] = False
        allowed[1, :, :, -1] = False
        text_mask = jnp.asarray(text_mask)
    run = jax.jit(functools.partial(grat_attention, size=size, group=group, blocks=blocks))
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(allowed))
    found = run(q, k, v, text_mask=text_mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if not mask.all():
        assert np.abs(found - jax.nn.dot_product_attention(q, k, v)).max() > 0.01


def test_it_is_the_official_attention_of_a_video():
    with np.load(GOLDEN) as golden:
        assert "OliverRensu/GRAT" in str(golden["provenance"])
        q, k, v, expected = (jnp.asarray(golden[name]) for name in ("query", "key", "value", "output"))
    # The last two of five tokens of text are padding.
    fields = {"size": (4, 6, 4), "group": (2, 2, 2), "text_mask": jnp.arange(5)[None] < 3}
    found = jax.jit(functools.partial(grat_attention, blocks=criss_cross, **fields))(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Negative control: another pattern.
    assert np.abs(jax.jit(functools.partial(grat_attention, **fields))(q, k, v) - expected).max() > 0.1


@pytest.mark.parametrize(("size", "group", "text"), MAPS)
def test_a_neighbourhood_of_all_groups_is_dense_attention(size, group, text, rng):
    q, k, v = tokens(rng, math.prod(size) + text)
    blocks = functools.partial(neighbourhood, radius=max(size))
    run = jax.jit(functools.partial(grat_attention, size=size, group=group, blocks=blocks, scale=0.6))
    np.testing.assert_allclose(run(q, k, v), jax.nn.dot_product_attention(q, k, v, scale=0.6), atol=1e-5)


@pytest.mark.parametrize(("blocks", "sees"), PATTERNS)
def test_every_allowed_pair_is_reached_and_no_other(blocks, sees, rng):
    size, group, text = (5, 7), (2, 2), 2
    q, k, v = tokens(rng, 37, heads=1, key_heads=1, batch=1)
    run = functools.partial(grat_attention, size=size, group=group, blocks=blocks)
    mask = allowed_pairs(size, group, text, sees)
    assert not mask.all()
    jacobian = jax.jit(jax.jacrev(lambda v: run(q, k, v).sum((0, 2, 3))))(v)
    np.testing.assert_array_equal(np.asarray(jacobian)[:, 0, :, 0, 0] != 0, mask)
    # Through the keys too; a query that sees one key alone would not depend on it.
    weights = jnp.arange(1.0, 5.0)
    jacobian = jax.jit(jax.jacrev(lambda k: (run(q, k, v) @ weights)[0, :, 0]))(k)
    np.testing.assert_array_equal(np.any(np.asarray(jacobian)[:, 0, :, 0] != 0, axis=-1), mask)


@pytest.mark.parametrize(("size", "group", "_text"), MAPS)
def test_ungroup_undoes_regroup(size, group, _text, rng):
    x = jnp.asarray(rng.normal(size=(2, 3, math.prod(size), 2, 4)), jnp.float32)
    groups = regroup(x, size, group)
    counts = [-(-total // step) for total, step in zip(size, group, strict=True)]
    assert groups.shape == (2, 3, math.prod(counts), math.prod(group), 2, 4)
    np.testing.assert_array_equal(ungroup(groups, size, group), x)


def test_a_group_is_contiguous_and_in_row_major_order():
    numbers = jnp.arange(24.0).reshape(24, 1, 1)
    found = regroup(numbers, (4, 6), (2, 3))[..., 0, 0]
    np.testing.assert_array_equal(found[0], [0, 1, 2, 6, 7, 8])
    np.testing.assert_array_equal(found[3], [15, 16, 17, 21, 22, 23])


def test_fewer_heads_of_keys_serve_consecutive_heads_of_queries(rng):
    q, k, v = tokens(rng, 24, heads=4, key_heads=2)
    run = jax.jit(functools.partial(grat_attention, size=(4, 6), group=(2, 2)))
    found = run(q, k, v)
    np.testing.assert_allclose(found, run(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)), atol=1e-5)


def test_tiles_can_be_multiplied_by_jax_and_part_by_part(rng):
    q, k, v = (x.reshape(2, 1, *x.shape[1:]) for x in tokens(rng, 38))
    run = functools.partial(grat_attention, size=(5, 7), group=(2, 2), text_mask=jnp.ones((2, 1, 3), bool))
    expected = jax.jit(run)(q, k, v)
    for change in ({"attend": jax.nn.dot_product_attention}, {"groups_at_once": 5}, {"groups_at_once": 100}):
        np.testing.assert_allclose(jax.jit(functools.partial(run, **change))(q, k, v), expected, atol=1e-5)
    gradients = [
        jax.jit(jax.grad(lambda q, n=n: jnp.sum(jnp.sin(run(q, k, v, groups_at_once=n)))))(q) for n in (None, 5)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-5)


def largest_arrays(jaxpr):
    """Yield the number of entries of every array in a program."""
    for equation in jaxpr.eqns:
        yield from (math.prod(var.aval.shape) for var in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from largest_arrays(inner)


def test_no_array_has_an_entry_for_each_pair_of_tokens():
    # 64 x 64 tokens in groups of 8 x 8, which are 8 x 8 groups; forward and backward.
    size, group = (64, 64), (8, 8)
    length = math.prod(size)
    x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)

    def largest(attention):
        step = jax.value_and_grad(lambda *inputs: jnp.sum(attention(*inputs)), argnums=(0, 1, 2))
        return max(largest_arrays(jax.make_jaxpr(step)(x, x, x).jaxpr))

    for blocks, seen in ((neighbourhood, 9), (criss_cross, 15)):
        run = functools.partial(grat_attention, size=size, group=group, blocks=blocks)
        assert largest(run) == length * seen * 64
        # One group at a time there is not even an array of all tiles.
        assert largest(functools.partial(run, groups_at_once=1)) <= length * 64
    assert largest(jax.nn.dot_product_attention) >= length**2


def test_products_cost_the_share_of_groups_that_a_group_sees():
    # The paper's largest picture: 8192 x 8192 pixels are 512 x 512 tokens, 32 x 32 groups of 16 x 16.
    length = 512 * 512
    x = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
    full = count_macs(jax.nn.dot_product_attention, x, x, x)
    assert full == 4 * length**2
    for blocks, seen in ((neighbourhood, 9), (criss_cross, 63)):
        run = functools.partial(grat_attention, size=(512, 512), group=(16, 16), blocks=blocks)
        assert count_macs(run, x, x, x) * 1024 == full * seen
        in_parts = functools.partial(run, groups_at_once=64)
        assert count_macs(in_parts, x, x, x) * 1024 == full * seen


def test_module_with_all_groups_in_sight_is_plain_attention(rng):
    x = jnp.asarray(rng.normal(size=(2, 23, 8)), jnp.float32)
    plain = MultiHeadAttention(num_heads=2)
    params = jax.jit(plain.init)(jax.random.key(0), x)
    layer = LAYER.clone(blocks=functools.partial(neighbourhood, radius=3))
    run = jax.jit(functools.partial(layer.apply, size=(5, 4)))
    np.testing.assert_allclose(run(params, x), jax.jit(plain.apply)(params, x), atol=1e-5)


def test_tokens_of_a_text_and_of_a_group_may_be_permuted(rng):
    x = jnp.asarray(rng.normal(size=(1, 19, 8)), jnp.float32)
    run = jax.jit(functools.partial(LAYER.apply, size=(2, 8)))
    params = jax.jit(functools.partial(LAYER.init, size=(2, 8)))(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: 20 * leaf, params)
    expected = run(params, x)
    within = np.array([9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11, 12, 13, 14, 15, 18, 16, 17])
    np.testing.assert_allclose(run(params, x[:, within]), expected[:, within], atol=1e-4)
    # Negative control: tokens of distant groups.
    across = within.copy()
    across[[0, 7]] = across[[7, 0]]
    assert np.abs(run(params, x[:, across]) - expected[:, across]).max() > 0.01


def test_softmax_stays_in_float32_under_bfloat16(rng):
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens(rng, 24))
    program = str(jax.make_jaxpr(functools.partial(grat_attention, size=(4, 6), group=(2, 2)))(q, k, v))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|reduce_max) ", program)
    assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


def test_keys_must_be_of_the_queries_tokens(rng, untyped):
    q, k, v = tokens(rng, 24)
    with pytest.raises(ValueError, match="24 queries and 23 keys must be the 24"):
        grat_attention(q, k[:, 1:], v[:, 1:], size=(4, 6), group=(2, 2))
    with pytest.raises(ValueError, match=r"text_mask of shape \(2, 1\) must be of the 0 tokens"):
        grat_attention(q, k, v, size=(4, 6), group=(2, 2), text_mask=jnp.ones((2, 1), bool))

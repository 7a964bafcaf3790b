import dataclasses
import functools
import math
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.core import axes
from jaxlayers.core.reference import reference_name
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import rmt
from jaxlayers.window.rmt import (
    RMT,
    ManhattanAttention,
    RMTBlock,
    decayed_attention,
    log_gammas,
    manhattan_log_decay,
    rotate_by_index,
)

TINY = RMT(
    num_classes=3,
    embed_dim=(4, 8),
    depths=(1, 2),
    num_heads=(2, 2),
    mlp_ratio=(2.0, 1.5),
    decomposed=(True, False),
    decays=((2.0, 4.0), (1.0, 6.0)),
    layer_scale=(None, 0.5),
    head_features=6,
    drop_path_rate=0.0,
)

CASES = (
    Case(
        name="manhattan_attention",
        within="rmt",
        module=ManhattanAttention(num_heads=2, decomposed=True),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 8)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=ManhattanAttention(3)),
            BadInput(match="features=8 must be divisible by num_heads=0", module=ManhattanAttention(0)),
            BadInput(match="features / num_heads = 1 must be even", module=ManhattanAttention(8)),
            BadInput(match=r"decay=\(0.0, 4.0\) must give every head", module=ManhattanAttention(2, decay=(0.0, 4.0))),
            BadInput(match="kernel_size=4 must be odd", module=ManhattanAttention(2, kernel_size=4)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 8)),)),
        ),
    ),
    Case(
        name="rmt_block",
        within="rmt",
        module=RMTBlock(num_heads=2, mlp_ratio=1.5, layer_scale=0.5),
        inputs=lambda rng: (rng.normal(size=(2, 4, 3, 8)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="mlp_ratio=0.1 must leave 8 features some", module=RMTBlock(2, mlp_ratio=0.1)),
            BadInput(match=r"rate=1.0 must lie in \[0, 1\)", module=RMTBlock(2, drop_path_rate=1.0)),
            BadInput(match="must be divisible by num_heads=5", module=RMTBlock(5)),
        ),
    ),
    Case(
        name="rmt",
        module=TINY.clone(depths=(1, 1)),
        inputs=lambda rng: (rng.normal(size=(2, 18, 15, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="must have one entry a stage", module=TINY.clone(depths=(1, 2, 3))),
            BadInput(match="positive depths", module=TINY.clone(depths=(1, 0))),
            BadInput(match=r"embed_dim=\(1, 8\) must be at least 2", module=TINY.clone(embed_dim=(1, 8))),
            BadInput(match="head_features=0 positive", module=TINY.clone(head_features=0)),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match=r"drop_path_rate=1.0 must lie in", module=TINY.clone(drop_path_rate=1.0)),
            BadInput(match="remat='ful' must be one of", module=TINY.clone(remat="ful")),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters and running statistics in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        name = path[-1].key
        value = 0.4 * rng.normal(size=leaf.shape) + (name == "scale")
        return jnp.asarray(np.exp(value) if name == "var" else value, dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    """A small model's variables, images that fit no stride, and logits, pyramid and output without a head."""
    x = image(2, 17, 22, 3)
    variables = random_variables(TINY, x)
    headless = TINY.clone(num_classes=0)

    @jax.jit
    def run(variables):
        params = {name: value for name, value in variables["params"].items() if name != "head"}
        averaged = headless.apply({**variables, "params": params}, x)
        return TINY.apply(variables, x), nn.apply(RMT.features, TINY)(variables, x), averaged

    return variables, x, run(variables)


# The decay -------------------------------------------------------------------------------------------------------


def test_decay_of_a_map_is_the_kronecker_product_of_its_axes(rng):
    # Exactly: in whole numbers, the Kronecker product of powers is the sum of exponents.
    exponents = np.asarray(manhattan_log_decay((4, 7), (1.0, 3.0)))
    rows, columns = (np.asarray(manhattan_log_decay((length,), (1.0, 3.0))) for length in (4, 7))
    for head in range(2):
        summed = np.kron(rows[head], np.ones((7, 7))) + np.kron(np.ones((4, 4)), columns[head])
        np.testing.assert_array_equal(exponents[head], summed)
    with jax.enable_x64(True):
        log_gamma = log_gammas(3, (2.0, 4.0))
        full, rows, columns = (
            np.exp(np.asarray(manhattan_log_decay(size, log_gamma, dtype=jnp.float64))) for size in ((4, 7), (4,), (7,))
        )
    for head in range(3):
        np.testing.assert_allclose(full[head], np.kron(rows[head], columns[head]), rtol=1e-14)
    # Negative control: a decay with the Euclidean distance is no such product.
    places = np.stack(np.meshgrid(np.arange(4), np.arange(7), indexing="ij"), -1).reshape(-1, 2)
    euclidean = np.exp(log_gamma[0] * np.linalg.norm(places[:, None] - places, axis=-1))
    assert np.abs(euclidean - np.kron(rows[0], columns[0])).max() > 0.1


def test_decay_counts_steps_along_the_axes():
    log_decay = np.asarray(manhattan_log_decay((3, 5), (-0.5,)))[0]
    for n, m in np.ndindex(15, 15):
        assert log_decay[n, m] == -0.5 * (abs(n // 5 - m // 5) + abs(n % 5 - m % 5))


def test_heads_look_further_one_after_another():
    gammas = np.exp(log_gammas(4, (2.0, 4.0)))
    np.testing.assert_allclose(gammas, [1 - 1 / 4, 1 - 1 / 8, 1 - 1 / 16, 1 - 1 / 32], rtol=1e-12)
    np.testing.assert_allclose(np.exp(log_gammas(8, (1.0, 3.0)))[5], 1 - 2 ** (-1 - 3 * 5 / 8), rtol=1e-12)


def test_decay_is_invariant_under_flips(rng):
    log_decay = np.asarray(manhattan_log_decay((3, 4), (-1.0,))).reshape(3, 4, 3, 4)
    np.testing.assert_array_equal(log_decay[::-1, :, ::-1], log_decay)
    np.testing.assert_array_equal(log_decay[:, ::-1, :, ::-1], log_decay)
    # Negative control: tokens moved around the border change their distances.
    assert not np.array_equal(np.roll(log_decay, 1, (1, 3)), log_decay)


# The rotation ----------------------------------------------------------------------------------------------------


def turned(x):
    """The rotation in complex numbers and float64."""
    height, width, _, dim = x.shape[-4:]
    index = np.arange(height * width).reshape(height, width, 1, 1)
    angle = index / 10000.0 ** (np.arange(dim // 2) / max(dim // 2 - 1, 1))
    product = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([product.real, product.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("dim", [2, 4, 10])
def test_rotation_equals_complex_multiplication(rng, dim):
    x = rng.normal(size=(2, 3, 5, 2, dim))
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(rotate_by_index)(jnp.asarray(x)), turned(x), atol=1e-12)


def test_rotation_keeps_its_digits_on_large_maps(rng):
    x = rng.normal(size=(1, 60, 70, 1, 16)).astype(np.float32)
    expected = turned(x.astype(np.float64))
    assert np.abs(np.asarray(jax.jit(rotate_by_index)(jnp.asarray(x))) - expected).max() < 2e-6
    # Control: angles as products in float32 lose them.
    frequencies = (10000.0 ** -np.linspace(0, 1, 8)).astype(np.float32)
    angle = np.arange(60 * 70, dtype=np.float32).reshape(60, 70, 1, 1) * frequencies
    naive = x[..., ::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    assert np.abs(naive - expected[..., ::2]).max() > 2e-5


def test_products_of_turned_tokens_depend_on_the_difference_of_their_indices(rng):
    query, key = (np.broadcast_to(rng.normal(size=6), (1, 4, 5, 1, 6)) for _ in range(2))
    with jax.enable_x64(True):
        query, key = (np.asarray(jax.jit(rotate_by_index)(jnp.asarray(one))).reshape(20, 6) for one in (query, key))
    products = query @ key.T
    for offset in range(-19, 20):
        assert np.ptp(np.diagonal(products, offset)) < 1e-12
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(query, axis=-1), np.linalg.norm(query[0]), rtol=1e-12)


# An independent twin: NumPy, one token at a time -----------------------------------------------------------------


def twin_depthwise(x, kernel, bias):
    """Convolve a map [height, width, features] depthwise, with zeros beyond the border."""
    radius = kernel.shape[0] // 2
    out = np.tile(bias, (*x.shape[:2], 1))
    for i, j in np.ndindex(*x.shape[:2]):
        for a, b in np.ndindex(*kernel.shape[:2]):
            row, column = i + a - radius, j + b - radius
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                out[i, j] += kernel[a, b, 0] * x[row, column]
    return out


def twin_attention(params, x, *, num_heads, decomposed, decay, after_softmax):
    """Manhattan attention on one map [height, width, features], in the words of the paper."""
    height, width, features = x.shape
    dim = features // num_heads
    query, key, value = (x @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value"))
    out = np.zeros_like(x)
    for head in range(num_heads):
        part = slice(head * dim, (head + 1) * dim)
        gamma = 1 - 2.0 ** (-decay[0] - decay[1] * head / num_heads)
        q, k = (turned(one[:, :, None, part])[:, :, 0] for one in (query, key))

        def mix(place, others, values, q=q, k=k, gamma=gamma):
            fading = np.array([gamma ** (abs(place[0] - one[0]) + abs(place[1] - one[1])) for one in others])
            scores = np.exp([q[place] @ k[one] / math.sqrt(dim) for one in others])
            if after_softmax:
                weights = scores / scores.sum() * fading
            else:
                weights = scores * fading / (scores * fading).sum()
            return sum(weight * values[one] for weight, one in zip(weights, others, strict=True))

        places = list(np.ndindex(height, width))
        values = value[..., part]
        if decomposed:
            along = np.zeros_like(values)
            for i, j in places:
                along[i, j] = mix((i, j), [(i, other) for other in range(width)], values)
            for i, j in places:
                out[i, j, part] = mix((i, j), [(other, j) for other in range(height)], along)
        else:
            for place in places:
                out[(*place, part)] = mix(place, places, values)
    out = out + twin_depthwise(value, **params["local_context"])
    return out @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("after_softmax", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_attention_equals_a_loop_over_tokens(decomposed, after_softmax):
    options = {"decomposed": decomposed, "decay": (1.0, 3.0)}
    layer = ManhattanAttention(num_heads=2, decay_after_softmax=after_softmax, **options)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4, 8)))
        variables = random_variables(layer, x, dtype=np.float64)
        found = jax.jit(layer.apply)(variables, x)
        assert found.dtype == jnp.float64
    expected = twin_attention(
        jax.tree.map(np.asarray, variables["params"]),
        np.asarray(x)[0],
        num_heads=2,
        after_softmax=after_softmax,
        **options,
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-11)


def test_block_equals_its_twin():
    block = RMTBlock(num_heads=2, decomposed=True, mlp_ratio=1.5, layer_scale=0.5)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 4)))
        variables = random_variables(block, x, dtype=np.float64)
        found = jax.jit(block.apply)(variables, x)[0]
    params = jax.tree.map(np.asarray, variables["params"])

    def norm(x, part):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * part["scale"] + part["bias"]

    y = np.asarray(x)[0]
    y = y + twin_depthwise(y, **params["position"])
    mixed = twin_attention(
        params["attention"],
        norm(y, params["norm1"]),
        num_heads=2,
        decomposed=True,
        decay=(2.0, 4.0),
        after_softmax=False,
    )
    y = y + params["layer_scale1"] * mixed
    perceptron = params["feed_forward"]
    hidden = norm(y, params["norm2"]) @ perceptron["up"]["kernel"] + perceptron["up"]["bias"]
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    hidden = hidden + twin_depthwise(hidden, **perceptron["depthwise"])
    y = y + params["layer_scale2"] * (hidden @ perceptron["down"]["kernel"] + perceptron["down"]["bias"])
    np.testing.assert_allclose(found, y, atol=1e-11)


# Limits ----------------------------------------------------------------------------------------------------------


def plain_heads(params, x):
    """Queries and keys, turned, and values, in two heads."""

    def heads(name):
        return nn.Dense(x.shape[-1]).apply({"params": params[name]}, x).reshape(*x.shape[:-1], 2, -1)

    return rotate_by_index(heads("query")), rotate_by_index(heads("key")), heads("value")


def with_convolution(params, x, mixed):
    """What follows the mixing of the values of one map `[1, height, width, features]`."""
    params = jax.tree.map(np.asarray, params)
    value = np.asarray(x)[0] @ params["value"]["kernel"] + params["value"]["bias"]
    out = np.asarray(mixed) + twin_depthwise(value, **params["local_context"])
    return out @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize("decomposed", [False, True])
def test_gamma_of_one_is_plain_attention(decomposed):
    layer = ManhattanAttention(num_heads=2, decomposed=decomposed, decay=(60.0, 0.0))
    x = image(1, 4, 5, 8)
    variables = random_variables(layer, x)

    @jax.jit
    def run(variables):
        params = variables["params"]
        query, key, value = plain_heads(params, x)
        if decomposed:
            # Plain axial attention: Flax attends over the axis before heads and features.
            value = nn.dot_product_attention(query, key, value)
            columns = (jnp.swapaxes(one, 1, 2) for one in (query, key, value))
            plain = jnp.swapaxes(nn.dot_product_attention(*columns), 1, 2)
        else:
            plain = nn.dot_product_attention(*(one.reshape(1, 20, 2, 4) for one in (query, key, value)))
        others = [layer, layer.clone(decay_after_softmax=True), layer.clone(decay=(2.0, 4.0))]
        return plain.reshape(x.shape), *(one.apply(variables, x) for one in others)

    plain, found, after, near = run(variables)
    expected = with_convolution(variables["params"], x, plain)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # With gamma of one it makes no difference where D stands; control: smaller gammas are another layer.
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(near - expected).max() > 0.05


@pytest.mark.parametrize("decomposed", [False, True])
def test_gamma_of_zero_leaves_every_token_alone(decomposed):
    layer = ManhattanAttention(num_heads=2, decomposed=decomposed, decay=(1e-9, 0.0))
    x = image(1, 4, 5, 8)
    variables = random_variables(layer, x)
    part = variables["params"]["value"]
    expected = with_convolution(variables["params"], x, x @ part["kernel"] + part["bias"])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize("after_softmax", [False, True])
def test_without_queries_the_decomposed_form_is_the_full_one(after_softmax):
    # Then the softmax of the Kronecker sum is the Kronecker product of the softmaxes.
    full = ManhattanAttention(num_heads=2, decay=(1.0, 2.0), decay_after_softmax=after_softmax)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3, 8)))
        params = random_variables(full, x, dtype=np.float64)["params"]
        run = jax.jit(lambda p: [one.apply({"params": p}, x) for one in (full, full.clone(decomposed=True))])
        one, other = run({**params, "query": jax.tree.map(np.zeros_like, params["query"])})
        np.testing.assert_allclose(one, other, atol=1e-13)
        # Negative control: queries that ask for something see the difference.
        one, other = run(params)
        assert np.abs(one - other).max() > 0.01


def test_weights_add_up_to_one_unless_the_decay_comes_after():
    x = image(1, 3, 4, 8)
    layer = ManhattanAttention(num_heads=2)
    others = [
        layer,
        layer.clone(decomposed=True),
        layer.clone(decay_after_softmax=True),
        layer.clone(decay=(60.0, 0.0)),
    ]
    variables = random_variables(layer, x)
    run = jax.jit(lambda v: [one.apply(v, x, mutable=["intermediates"])[1]["intermediates"] for one in others])
    full, axial, after, plain = ({name: np.asarray(sown[0]) for name, sown in one.items()} for one in run(variables))
    assert {name: one.shape for name, one in {**full, **axial}.items()} == {
        "attention_weights": (1, 2, 12, 12),
        "row_weights": (1, 3, 2, 4, 4),
        "column_weights": (1, 4, 2, 3, 3),
    }
    for one in (*full.values(), *axial.values()):
        np.testing.assert_allclose(one.sum(-1), 1.0, atol=1e-6)
    assert after["attention_weights"].sum(-1).max() < 1.0
    decay = np.exp(manhattan_log_decay((3, 4), log_gammas(2, (2.0, 4.0))))
    np.testing.assert_allclose(after["attention_weights"], plain["attention_weights"] * decay, atol=1e-6)


# What reaches what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_every_token_reaches_every_token(decomposed):
    layer = ManhattanAttention(num_heads=2, decomposed=decomposed)
    x = image(5, 7, 8)
    variables = random_variables(layer, x)
    # Without the convolution, so that attention alone is seen.
    variables["params"]["local_context"] = jax.tree.map(jnp.zeros_like, variables["params"]["local_context"])
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda x: layer.apply(variables, x).sum(-1)))(x))
    assert np.all(np.abs(jacobian).max(-1) > 0)

    # Negative control: values mixed along one axis alone stay in their row.
    log_decay = manhattan_log_decay((7,), log_gammas(2, (2.0, 4.0)))
    heads = x.reshape(5, 7, 2, 4)

    def rows(value):
        return decayed_attention(heads, heads, value, log_decay)[0].sum((-2, -1))

    heard = np.abs(np.asarray(jax.jit(jax.jacobian(rows))(heads))).max((-2, -1)) > 0
    same_row = np.eye(5, dtype=bool)[:, None, :, None]
    np.testing.assert_array_equal(heard, np.broadcast_to(same_row, heard.shape))


def test_stem_sees_nine_pixels_each_way_and_a_block_sees_all():
    model = TINY.clone(embed_dim=(4,), depths=(1,), num_heads=(2,), mlp_ratio=(2.0,), decomposed=(True,))
    model = model.clone(decays=((2.0, 4.0),), layer_scale=(None,))
    x = image(41, 38, 3)
    variables = random_variables(model, x)

    def token(module, x):
        return module.patch_embed(x, deterministic=True)[6, 4].sum(), module.features(x)[0].array[6, 4].sum()

    jacobian = jax.jit(jax.jacrev(functools.partial(nn.apply(token, model), variables)))(x)
    by_stem, by_block = (np.abs(np.asarray(one)).max(-1) > 0 for one in jacobian)
    rows, columns = np.abs(np.arange(41) - 24) <= 9, np.abs(np.arange(38) - 16) <= 9
    np.testing.assert_array_equal(by_stem, rows[:, None] & columns)
    assert by_block.all()


# Cost ------------------------------------------------------------------------------------------------------------


def test_decomposed_attention_costs_as_many_products_as_rows_and_columns_are_long():
    def macs(decomposed, height, width):
        layer = ManhattanAttention(num_heads=2, decomposed=decomposed)
        x = jax.ShapeDtypeStruct((height, width, 8), jnp.float32)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        # Less the projections and the convolution.
        return count_macs(layer.apply, variables, x) - height * width * (4 * 8 * 8 + 25 * 8)

    for height, width in [(4, 4), (8, 8), (16, 8), (5, 7)]:
        assert macs(True, height, width) == 2 * 8 * height * width * (height + width)
        assert macs(False, height, width) == 2 * 8 * (height * width) ** 2
    assert macs(True, 16, 16) == 8 * macs(True, 8, 8)
    assert macs(False, 16, 16) == 16 * macs(False, 8, 8)


# The model -------------------------------------------------------------------------------------------------------

# Parameters, and millions of multiply-accumulates at 224 x 224, counted in the authors' code with both products of the
# attention. Their table, which does not say how it counts, has 2.5, 4.5, 9.7 and 18.2 G.
PUBLISHED = {
    "rmt_tiny": (14_334_216, 2637.221),
    "rmt_small": (26_967_240, 4776.575),
    "rmt_base": (54_154_896, 10373.118),
    "rmt_large": (95_464_864, 19487.965),
}


@pytest.mark.parametrize("name", rmt.VARIANTS)
def test_variants_have_the_published_parameters_and_multiply_accumulates(name):
    variant = rmt.VARIANTS[name]
    model = variant["module"](**{key: value for key, value in variant.items() if key not in ("module", "inputs")})
    # All blocks of a stage are alike: count one and multiply.
    summary = summarize(model.clone(depths=(1,) * len(model.depths)), *variant["inputs"])
    extra = [
        (depth - 1, row)
        for stage, depth in enumerate(model.depths)
        for row in summary.rows
        if row.path == (f"stages_{stage}", "blocks_0")
    ]
    assert len(extra) == len(model.depths)
    assert summary.parameters + sum(times * row.parameters for times, row in extra) == PUBLISHED[name][0]
    macs = summary.macs + sum(times * row.macs for times, row in extra)
    np.testing.assert_allclose(macs / 1e6, PUBLISHED[name][1], rtol=1e-6)


def test_features_are_a_pyramid_of_every_stage(tiny):
    _, _, (_, levels, _) = tiny
    assert [level.array.shape for level in levels] == [(2, 5, 6, 4), (2, 3, 3, 8)]
    assert [level.stride for level in levels] == [(4, 4), (8, 8)]


def test_one_tree_serves_every_size(tiny):
    variables, _, _ = tiny
    shapes = jax.tree.map(jnp.shape, variables)
    for size in [(1, 50), (64, 31)]:
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.tree.map(jnp.shape, jax.eval_shape(TINY.init, jax.random.key(0), images)) == shapes
        assert jax.eval_shape(TINY.apply, variables, images).shape == (1, 3)


def test_logits_are_the_head_on_the_mean_of_the_normed_tokens(tiny):
    variables, _, (logits, levels, averaged) = tiny
    params, statistics = variables["params"], variables["batch_stats"]["final_norm"]
    y = np.asarray(levels[-1].array) @ params["projection"]["kernel"] + params["projection"]["bias"]
    y = (y - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    y = np.asarray(y * params["final_norm"]["scale"] + params["final_norm"]["bias"], np.float64)
    y = (y / (1 + np.exp(-y))).mean((1, 2))
    np.testing.assert_allclose(averaged, y, atol=1e-5)
    np.testing.assert_allclose(logits, y @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)


def test_training_updates_every_statistic_and_norms_by_the_batch():
    x = image(3, 18, 15, 3)
    variables = random_variables(TINY, x)

    def keep(module, _):
        return module.name in ("conv1", "norm1") and module.path[0] == "patch_embed"

    @jax.jit
    def train(variables):
        return TINY.apply(
            variables,
            x,
            deterministic=False,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=keep,
        )[1]

    state = train(variables)
    moved = jax.tree.map(lambda old, new: bool(np.all(old != new)), variables["batch_stats"], state["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert len(jax.tree.leaves(moved)) == 2 * (4 + 1 + 1)
    stem = state["intermediates"]["patch_embed"]
    before, after = (np.asarray(stem[name]["__call__"][0]) for name in ("conv1", "norm1"))
    mean, var = before.mean((0, 1, 2)), before.var((0, 1, 2))
    part = variables["params"]["patch_embed"]["norm1"]
    np.testing.assert_allclose(after, (before - mean) / np.sqrt(var + 1e-5) * part["scale"] + part["bias"], atol=1e-4)
    old, new = (one["batch_stats"]["patch_embed"]["norm1"] for one in (variables, state))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * var, atol=1e-5)


def test_drop_path_rates_grow_with_depth_and_drop_whole_samples():
    model = TINY.clone(depths=(2, 3), drop_path_rate=0.8)
    rates = model.bind({}).stages[0].rates + model.bind({}).stages[1].rates
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.6, 0.8])
    # With the convolution silent, a block whose branches are both dropped returns its input.
    block = RMTBlock(num_heads=1, mlp_ratio=1.0, drop_path_rate=0.5)
    x = image(64, 2, 1, 4)
    variables = random_variables(block, x)
    variables["params"]["position"] = jax.tree.map(jnp.zeros_like, variables["params"]["position"])
    y = jax.jit(functools.partial(block.apply, deterministic=False))(variables, x, rngs={"dropout": jax.random.key(0)})
    same = np.asarray(x == y).reshape(64, -1)
    assert np.all(same.all(1) == same.any(1))
    assert 0.1 < same.all(1).mean() < 0.4


@pytest.mark.slow
def test_recomputation_changes_no_gradient_and_is_in_the_program():
    one_stage = {"embed_dim": (2,), "depths": (1,), "num_heads": (1,), "mlp_ratio": (1.0,), "decomposed": (True,)}
    model = TINY.clone(**one_stage, decays=((2.0, 4.0),), layer_scale=(None,))
    x = image(2, 8, 8, 1)
    variables = random_variables(model, x)

    def run(policy):
        def loss(stage):
            params = {**variables["params"], "stages_0": stage}
            return jnp.sum(jnp.sin(model.clone(remat=policy).apply({**variables, "params": params}, x)))

        return jax.grad(loss)

    stage = variables["params"]["stages_0"]
    plain = jax.jit(run("none"))(stage)
    for policy in ("full", "attention"):
        assert "remat" in str(jax.make_jaxpr(run(policy))(stage))
        found = jax.jit(run(policy))(stage)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)
    assert "remat" not in str(jax.make_jaxpr(run(False))(stage))


def test_softmax_decay_and_rotation_stay_in_float32_under_bfloat16():
    block = RMTBlock(num_heads=1, decomposed=True, dtype=jnp.bfloat16)
    x = jnp.ones((1, 3, 4, 4), jnp.bfloat16)
    program = str(jax.make_jaxpr(block.apply)(random_variables(block, x), x))
    assert re.search(r":f32\[[\d,]*\] = exp ", program)
    assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
    assert re.search(r":bf16\[[\d,]*\] = dot_general", program)
    assert not re.search(r":f32\[[\d,]*\] = (dot_general|conv_general_dilated)", program)
    x = image(1, 40, 50, 1, 4)
    # Rounded once at the end: half a unit in the last place of bfloat16.
    half = jax.jit(rotate_by_index)(x.astype(jnp.bfloat16))
    expected = turned(np.asarray(x.astype(jnp.bfloat16), np.float64))
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_a_map_split_along_its_height_gives_the_same():
    layer = ManhattanAttention(num_heads=2, decomposed=True)
    x = image(2, 8, 3, 8)
    variables = random_variables(layer, x)

    def step(params, x):
        def loss(params):
            out = layer.apply({"params": params}, x)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = jax.jit(step)(variables["params"], x)
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", "sequence")
    rules = ((axes.BATCH, "data"), (axes.HEIGHT, "sequence"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        found = jax.jit(step)(variables["params"], spread)
    assert found[0][1].sharding.spec[:2] == tuple(spec)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(rmt.no_decay(tiny[0]["params"]))
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "layer_scale1", "layer_scale2"}
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_stem_to_the_head(tiny):
    ids = rmt.layer_ids(tiny[0]["params"], TINY)

    def only(tree):
        return set(jax.tree.leaves(tree))

    assert only(ids["patch_embed"]) == {0}
    assert only(ids["stages_0"]["blocks_0"]) == only(ids["stages_1"]["downsample"]) == {1}
    assert [only(ids["stages_1"][f"blocks_{index}"]) for index in range(2)] == [{2}, {3}]
    assert only(ids["projection"]) == only(ids["final_norm"]) == only(ids["head"]) == {4}


def to_reference(variables):
    """Write our variables the way the authors' code stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(variables, sep="/").items():
        leaf = np.asarray(leaf)
        if path.endswith("kernel"):
            leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
        if "layer_scale" in path:
            leaf = leaf[None, None, None]
        tensors[reference_name(path.partition("/")[2], rmt.REFERENCE_NAMES["official"])] = leaf
    return tensors


def test_reference_names_cover_every_variable(tiny):
    tensors = to_reference(tiny[0])
    assert len(tensors) == len(jax.tree.leaves(tiny[0]))
    computed = {"norm.num_batches_tracked": np.zeros(()), "layers.0.Relpos.decay": np.zeros(2)}
    found = rmt.from_reference({**tensors, **computed}, TINY)
    jax.tree.map(np.testing.assert_array_equal, found, tiny[0])


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0])
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        rmt.from_reference(tensors, TINY, source="timm")
    with pytest.raises(ValueError, match=r"source='official' must hold 'patch_embed.proj.0.weight'"):
        rmt.from_reference({}, TINY)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['norm.running_mean'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "norm.running_mean"}
        rmt.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"must give .* its shape \(6,\), not \(8,\); set the fields"):
        rmt.from_reference(tensors, TINY.clone(mlp_ratio=(1.5, 1.5)))


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (RMT, RMTBlock, ManhattanAttention):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13

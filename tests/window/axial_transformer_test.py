import functools
import itertools
import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlayers.geometry.groups import Cyclic, Translation
from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case, Symmetry
from jaxlayers.window import axial_transformer
from jaxlayers.window.axial_transformer import (
    AxialAttention,
    AxialBlock,
    AxialEncoder,
    AxialTransformer,
    bits_per_dimension,
    decode,
    empty_cache,
    sample,
    shift,
)

KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
TURNS = Symmetry(
    group=Translation(2, cyclic=True),
    inputs=("image",),
    output="image",
    control=Cyclic(4),
    reason="quarter turns exchange the axes, whose blocks have weights of their own",
)
SMALL = AxialTransformer((3, 4), channels=2, num_values=5, features=8, num_heads=2)

CASES = (
    Case(
        name="axial_attention",
        within="axial_transformer",
        module=AxialAttention(num_heads=2, axis="depth", rank=3, causal=True),
        inputs=lambda rng: (rng.normal(size=(2, 4, 3, 2, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_heads=3", module=AxialAttention(3)),
            BadInput(match="features=8 must be divisible by num_heads=0", module=AxialAttention(0)),
            BadInput(match=r"axis='depth' must be one of \('height', 'width'\)", module=AxialAttention(2, "depth")),
            BadInput(match=r"rank=4 must be one of \[1, 2, 3\]", module=AxialAttention(2, rank=4)),
            BadInput(match="3 spatial axes needs at least 4 axes", inputs=lambda rng: (np.ones((4, 3, 8)),)),
        ),
    ),
    Case(
        name="axial_block",
        within="axial_transformer",
        module=AxialBlock(num_heads=2, axis="height", mlp_ratio=2.0),
        inputs=lambda rng: (rng.normal(size=(2, 4, 4, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        symmetries=(TURNS,),
        bad_inputs=(
            BadInput(match="hidden_features=0 and", module=AxialBlock(2, mlp_ratio=0.0)),
            BadInput(match=r"dropout_rate=1.0 must lie in \[0, 1\)", module=AxialBlock(2, dropout_rate=1.0)),
            BadInput(match=r"axis='tokens' must be one of", module=AxialBlock(2, axis="tokens")),
        ),
    ),
    Case(
        name="axial_encoder",
        module=AxialEncoder(num_heads=2, depth=2),
        inputs=lambda rng: (rng.normal(size=(2, 3, 3, 4)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        symmetries=(TURNS,),
        bad_inputs=(
            BadInput(match="depth=0 must be positive", module=AxialEncoder(2, depth=0)),
            BadInput(match="rank=0 one of", module=AxialEncoder(2, rank=0)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((3, 4)),)),
            BadInput(match="remat='ful' must be one of", module=AxialEncoder(2, remat="ful")),
        ),
    ),
    Case(
        name="axial_transformer",
        module=SMALL.clone(inner_depth=1),
        inputs=lambda rng: (rng.integers(0, 5, size=(2, 3, 4, 2)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"image_size=\(0, 4\) must be", module=SMALL.clone(image_size=(0, 4))),
            BadInput(match="encoder_depth=3 must be even", module=SMALL.clone(encoder_depth=3)),
            BadInput(match="outer_depth=0 must be even", module=SMALL.clone(outer_depth=0)),
            BadInput(match="inner_depth=0 must be at least 1", module=SMALL.clone(inner_depth=0)),
            BadInput(match="num_values=0 must be at least 1", module=SMALL.clone(num_values=0)),
            BadInput(match="dtype float32 must be of integers", inputs=lambda rng: (np.ones((1, 3, 4, 2)),)),
            BadInput(match=r"must end in image_size=\(3, 4\)", inputs=lambda rng: (np.ones((1, 4, 3, 2), int),)),
            BadInput(match="and channels=2", inputs=lambda rng: (np.ones((1, 3, 4, 3), int),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype), shapes)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def values(*shape, top=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, top, size=shape), jnp.int32)


# Compiled once for all tests: the parallel pass, and the greedy one place after another.
parallel = jax.jit(SMALL.apply)
one_by_one = jax.jit(functools.partial(decode, SMALL, batch_size=3, temperature=0.0))


@pytest.fixture(scope="module")
def small():
    """A small model's variables, three images, and their logits in one parallel pass."""
    x = values(3, 3, 4, 2)
    variables = random_variables(SMALL, x)
    return variables, x, parallel(variables, x)


# One axis --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 2, -1, 0, 7, -7])
def test_shift_moves_and_fills_with_zeros(distance):
    x = np.arange(1.0, 13.0).reshape(1, 4, 3)
    expected = np.zeros_like(x)
    for index in range(4):
        if 0 <= index - distance < 4:
            expected[:, index] = x[:, index - distance]
    np.testing.assert_array_equal(shift(jnp.asarray(x), -2, distance), expected)
    np.testing.assert_array_equal(shift(jnp.asarray(x), 1, distance), expected)


def twin_attention(params, x, axis, num_heads, causal):
    """Attention along one axis of a map [*space, features], entry by entry and head by head, in NumPy."""
    features = x.shape[-1]
    project = {name: x @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value")}
    mixed = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        line = [(*place[:axis], j, *place[axis + 1 :]) for j in range(place[axis] + 1 if causal else x.shape[axis])]
        for head in range(num_heads):
            part = slice(head * features // num_heads, (head + 1) * features // num_heads)
            scores = np.array([project["query"][place][part] @ project["key"][one][part] for one in line])
            weights = np.exp(scores / math.sqrt(features // num_heads))
            answers = np.stack([project["value"][one][part] for one in line])
            mixed[place][part] = weights @ answers / weights.sum()
    return mixed @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.mark.parametrize(
    ("size", "axis", "index", "causal"),
    [
        ((5,), "tokens", 0, True),
        ((3, 4), "height", 0, True),
        ((3, 4), "width", 1, False),
        ((2, 3, 4), "depth", 0, False),
        ((2, 3, 4), "height", 1, True),
        ((2, 3, 4), "width", 2, True),
    ],
)
def test_attention_equals_a_loop_over_entries(size, axis, index, causal):
    layer = AxialAttention(num_heads=2, axis=axis, rank=len(size), causal=causal)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 4)))
        variables = random_variables(layer, x, dtype=np.float64)
        found = jax.jit(layer.apply)(variables, x)
        assert found.dtype == jnp.float64
    params = jax.tree.map(np.asarray, variables["params"])
    np.testing.assert_allclose(found[0], twin_attention(params, np.asarray(x)[0], index, 2, causal), atol=1e-11)


@pytest.mark.parametrize(("axis", "place"), [("height", -3), ("width", -2)])
def test_with_other_axes_of_size_one_it_is_dense_attention(axis, place):
    tokens = normal(2, 7, 8)
    dense = MultiHeadAttention(num_heads=2)
    variables = random_variables(dense, tokens)
    x = tokens[:, :, None] if axis == "height" else tokens[:, None]
    layer = AxialAttention(num_heads=2, axis=axis)
    assert jax.tree.map(jnp.shape, jax.eval_shape(layer.init, jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, variables
    )

    @jax.jit
    def run(variables):
        plain, causal = (layer.clone(causal=flag).apply(variables, x).reshape(2, 7, 8) for flag in (False, True))
        mask = jnp.tri(7, dtype=bool)
        return plain, dense.apply(variables, tokens), causal, dense.apply(variables, tokens, mask=mask)

    plain, expected, causal, expected_causal = run(variables)
    np.testing.assert_allclose(plain, expected, atol=1e-6)
    np.testing.assert_allclose(causal, expected_causal, atol=1e-6)
    # Negative control: with a mask the first tokens see less.
    assert np.abs(causal - plain).max() > 0.1


@pytest.mark.parametrize(
    ("axis", "index", "causal"), [("depth", 0, True), ("height", 1, False), ("height", 1, True), ("width", 2, False)]
)
def test_an_entry_hears_its_own_line_and_all_of_it(axis, index, causal):
    layer = AxialAttention(num_heads=2, axis=axis, rank=3, causal=causal)
    x = normal(1, 3, 4, 5, 4)
    apply = jax.jit(functools.partial(layer.apply, random_variables(layer, x)))
    at = (1, 2, 3)
    changed = apply(x.at[(0, *at)].add(1.0))
    heard = np.any(np.asarray(changed != apply(x))[0], axis=-1)
    expected = np.zeros((3, 4, 5), bool)
    line = [*at]
    for place in range(at[index] if causal else 0, (3, 4, 5)[index]):
        line[index] = place
        expected[tuple(line)] = True
    np.testing.assert_array_equal(heard, expected)


def test_attending_entry_by_entry_equals_attending_at_once():
    layer = AxialAttention(num_heads=2, axis="height", causal=True)
    x = normal(2, 5, 3, 8)
    variables = random_variables(layer, x)
    step = jax.jit(functools.partial(layer.apply, method="step"))
    cache, found = empty_cache((2, 3, 8), 5, 2), []
    for index in range(5):
        out, cache = step(variables, x[:, index], cache, index)
        found.append(out)
    np.testing.assert_allclose(np.stack(found, 1), jax.jit(layer.apply)(variables, x), atol=1e-5)


def test_attention_without_a_mask_has_no_steps(untyped):
    layer = AxialAttention(num_heads=2)
    with pytest.raises(ValueError, match="causal=False must be true to attend entry by entry; set causal"):
        layer.init(jax.random.key(0), jnp.ones((1, 8)), empty_cache((1, 8), 4, 2), 0, method="step")


# Several axes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_as_many_blocks_as_axes_reach_everything_and_fewer_do_not(rank):
    size = (4, 2, 3)[:rank]
    for depth in range(1, rank + 1):
        encoder = AxialEncoder(num_heads=1, depth=depth, rank=rank)
        x = normal(1, *size, 4)
        apply = jax.jit(functools.partial(encoder.apply, random_variables(encoder, x)))
        at = (1,) * rank
        # One feature alone: a norm takes out what all have in common.
        heard = np.any(np.asarray(apply(x.at[(0, *at, 0)].add(1.0)) != apply(x))[0], axis=-1)
        # The last axes are mixed first; along the others the entry keeps to its own place.
        expected = np.zeros(size, bool)
        expected[(*at[: rank - depth], *(slice(None),) * depth)] = True
        np.testing.assert_array_equal(heard, expected)


def test_encoder_commutes_with_permutations_of_each_axis_by_itself(rng):
    encoder = AxialEncoder(num_heads=2, depth=3, rank=3)
    x = normal(1, 3, 4, 5, 4)
    apply = jax.jit(functools.partial(encoder.apply, random_variables(encoder, x)))
    expected = apply(x)
    orders = [rng.permutation(length) for length in (3, 4, 5)]

    def permute(x):
        return x[:, orders[0]][:, :, orders[1]][:, :, :, orders[2]]

    np.testing.assert_allclose(apply(permute(x)), permute(expected), atol=1e-5)
    # Negative control: a permutation that does not keep lines together.
    order = rng.permutation(60)
    scattered = apply(x.reshape(1, 60, 4)[:, order].reshape(x.shape)).reshape(1, 60, 4)
    assert np.abs(scattered - expected.reshape(1, 60, 4)[:, order]).max() > 0.1


def test_cost_of_a_line_grows_as_the_root_of_the_map():
    def macs(layer, *size):
        x = jax.ShapeDtypeStruct((1, *size, 8), jnp.float32)
        return count_macs(layer.apply, jax.eval_shape(layer.init, jax.random.key(0), x), x)

    def dense(n):
        return macs(MultiHeadAttention(2), n)

    for n in (4, 8, 16, 32):
        entries = n * n
        assert macs(AxialAttention(2), n, n) == 4 * entries * 8**2 + 2 * entries * n * 8
        assert macs(AxialAttention(2, "depth", 3), n, 2, 3) == 6 * (4 * n * 8**2 + 2 * n**2 * 8)
    # Without the linear part: twice the side is 2^3 times the cost, N sqrt(N), and 2^4 times for dense attention.
    linear = 4 * 8**2
    axial = [macs(AxialAttention(2), n, n) - linear * n * n for n in (16, 32)]
    full = [dense(n * n) - linear * n * n for n in (16, 32)]
    assert (axial[1] / axial[0], full[1] / full[0]) == (8, 16)


# The autoregressive model ----------------------------------------------------------------------------------------


def places(size=(3, 4), channels=2):
    """All places in the order of the factors: channel by channel, row by row."""
    return [(i, j, c) for c in range(channels) for i in range(size[0]) for j in range(size[1])]


def test_changing_a_value_changes_the_logits_of_all_later_ones_and_of_no_other(small):
    variables, x, logits = small
    order = places()
    for number, place in enumerate(order):
        # To the bit: the same program runs on both.
        changed = parallel(variables, x.at[(0, *place)].set((x[(0, *place)] + 2) % 5)) != logits
        assert not np.any(changed[1:])
        heard = [bool(np.any(changed[(0, *other)])) for other in order]
        assert heard == [other > number for other in range(len(order))]


def test_derivative_of_the_logits_by_equal_and_later_pixels_is_exactly_zero():
    model = AxialTransformer((3, 3), channels=1, num_values=3, features=4, num_heads=1, inner_depth=1)
    x = values(1, 3, 3, 1, top=3)
    variables = random_variables(model, x)

    def logits(delta):
        def add(call, args, kwargs, context):
            out = call(*args, **kwargs)
            embedded = context.module.name == "token_embed" and context.method_name == "__call__"
            return out + delta if embedded else out

        with nn.intercept_methods(add):
            return model.apply(variables, x)[0, :, :, 0]

    jacobian = jax.jit(jax.jacfwd(logits))(jnp.zeros((3, 3, 4)))
    assert jacobian.shape == (3, 3, 3, 3, 3, 4)
    strength = np.asarray(jnp.abs(jacobian).max(axis=(2, 5))).reshape(9, 9)
    assert np.all(strength[np.triu_indices(9)] == 0.0)
    assert np.all(strength[np.tril_indices(9, -1)] > 0.0)


def test_probabilities_of_all_images_sum_to_one_and_images_are_drawn_by_them():
    model = AxialTransformer((2, 4), channels=1, num_values=2, features=4, num_heads=1, outer_depth=4, inner_depth=1)
    every = jnp.asarray(list(itertools.product((0, 1), repeat=8)), jnp.int32).reshape(-1, 2, 4, 1)
    params = random_variables(model, every[:1])["params"]
    # Far from even probabilities.
    variables = {"params": {**params, "head": jax.tree.map(lambda leaf: 4 * leaf, params["head"])}}
    log_p = jax.nn.log_softmax(jax.jit(model.apply)(variables, every))
    log_p = jnp.take_along_axis(log_p, every[..., None], axis=-1).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1.0, atol=1e-5)
    assert np.std(log_p) > 0.1
    draw = jax.jit(functools.partial(sample, model, batch_size=8192))
    codes = np.asarray(draw(variables, jax.random.key(0))).reshape(-1, 8) @ (2 ** np.arange(7, -1, -1))
    found = np.bincount(codes, minlength=256) / 8192
    assert np.abs(found - np.exp(log_p)).sum() < 0.2
    # Negative control: images drawn evenly are further off.
    even = np.bincount(np.random.default_rng(0).integers(0, 256, 8192), minlength=256) / 8192
    assert np.abs(even - np.exp(log_p)).sum() > 0.5


def twin_norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def twin_block(params, x, axis, causal):
    x = x + twin_attention(params["attention"], twin_norm(params["norm1"], x), axis, 2, causal)
    up, down = params["feed_forward"]["up"], params["feed_forward"]["down"]
    y = twin_norm(params["norm2"], x) @ up["kernel"] + up["bias"]
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    return x + y @ down["kernel"] + down["bias"]


def twin_logits(params, x, channel):
    """Logits of one channel of one image [height, width, channels], in the words of the paper."""
    height, width, channels = x.shape

    def where(name):
        return params[name]["rows"][:, None] + params[name]["columns"][None]

    seen = np.zeros((height + 2, width + 2, 2 * channels))
    seen[1:-1, 1:-1, :channel] = x[..., :channel] / 4
    seen[1:-1, 1:-1, channels + channel] = 1
    e = np.zeros((height, width, 8)) + params["channel_embed"]["bias"]
    for i, j in np.ndindex(height, width):
        for di, dj in np.ndindex(3, 3):
            e[i, j] += seen[i + di, j + dj] @ params["channel_embed"]["kernel"][di, dj]
    e = e + where("channel_places")
    e = twin_block(params["encoder"]["blocks_0"], e, 1, False)
    e = twin_block(params["encoder"]["blocks_1"], e, 0, False)
    h = params["token_embed"]["embedding"][x[..., channel]]
    p = where("places")
    u = twin_block(params["outer_blocks_0"], h + p + e, 1, False)
    u = twin_block(params["outer_blocks_1"], u, 0, True)
    r = p + e
    r[:, 1:] += h[:, :-1]
    r[1:] += u[:-1]
    for index in range(2):
        r = twin_block(params[f"inner_blocks_{index}"], r, 1, True)
    return twin_norm(params["final_norm"], r) @ params["head"]["kernel"] + params["head"]["bias"]


def test_model_equals_its_twin():
    with jax.enable_x64(True):
        x = jnp.asarray(values(1, 3, 4, 2))
        variables = random_variables(SMALL, x, dtype=np.float64)
        found = jax.jit(SMALL.apply)(variables, x)
        assert found.dtype == jnp.float64
    params = jax.tree.map(np.asarray, variables["params"])
    for channel in range(2):
        expected = twin_logits(params, np.asarray(x)[0], channel)
        np.testing.assert_allclose(found[0, :, :, channel], expected, atol=1e-10)


def test_chosen_channels_have_the_logits_they_have_among_all(small):
    variables, x, logits = small
    found = jax.jit(SMALL.apply)(variables, x, jnp.asarray([1]))
    np.testing.assert_allclose(found, logits[..., 1:, :], atol=1e-6)


# Sampling --------------------------------------------------------------------------------------------------------


def test_logits_while_sampling_are_those_of_the_parallel_pass(small):
    variables, x, logits = small
    images, found = one_by_one(variables, jax.random.key(0), given=x, known=jnp.ones((3, 4, 2), bool))
    np.testing.assert_array_equal(images, x)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert np.std(logits) > 0.1


def test_greedy_samples_equal_those_of_a_full_pass_for_each_value(small):
    variables, x, _ = small
    # What is given where nothing is known must not show.
    images, logits = one_by_one(variables, jax.random.key(0), given=x, known=jnp.zeros((3, 4, 2), bool))
    naive = jnp.zeros((3, 3, 4, 2), jnp.int32)
    for place in places():
        best = jnp.argmax(parallel(variables, naive), axis=-1)
        naive = naive.at[(slice(None), *place)].set(best[(slice(None), *place)])
    np.testing.assert_array_equal(images, naive)
    np.testing.assert_allclose(logits, parallel(variables, naive), atol=1e-5)
    assert len(np.unique(images)) > 1


def test_completion_keeps_what_is_known_and_draws_the_rest(small):
    variables, x, _ = small
    known = jnp.zeros((3, 4, 2), bool).at[:2].set(True).at[2, 1, 0].set(True)
    draw = jax.jit(functools.partial(sample, SMALL, batch_size=3))
    drawn = np.stack([draw(variables, jax.random.key(seed), given=x, known=known) for seed in range(16)])
    np.testing.assert_array_equal(np.any(drawn != np.asarray(x), axis=(0, 1)), ~np.asarray(known))


def test_sampling_an_image_costs_what_one_parallel_pass_costs(small):
    variables, x, _ = small
    parallel = count_macs(SMALL.apply, variables, x)
    drawn = count_macs(lambda v, key: sample(SMALL, v, key, batch_size=3), variables, jax.random.key(0))
    assert drawn == parallel


def test_sampling_refuses_what_does_not_fit(small, untyped):
    variables, x, _ = small
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        sample(SMALL, variables, key, batch_size=0)
    with pytest.raises(ValueError, match="temperature=-1 not negative"):
        sample(SMALL, variables, key, temperature=-1)
    with pytest.raises(ValueError, match=r"given images must have shape \(2, 3, 4, 2\)"):
        sample(SMALL, variables, key, batch_size=2, given=x)
    with pytest.raises(ValueError, match=r"known places \(3, 4, 2\); got \(3, 3, 4, 2\) and \(3, 4\)"):
        sample(SMALL, variables, key, batch_size=3, given=x, known=jnp.ones((3, 4), bool))


@pytest.mark.parametrize("channels", [1, 3])
def test_sampling_computes_in_the_dtype_of_the_model(small, channels):
    model = SMALL.clone(dtype=jnp.bfloat16, channels=channels)
    variables = jax.eval_shape(model.init, jax.random.key(0), values(1, 3, 4, channels))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    images, logits = jax.eval_shape(functools.partial(decode, model), variables, jax.random.key(0))
    assert (images.dtype, logits.dtype) == (jnp.int32, jnp.bfloat16)


# Learning --------------------------------------------------------------------------------------------------------


def test_bits_per_dimension_is_the_mean_negative_log_probability(rng):
    x = values(2, 3, 4, 2)
    assert math.isclose(bits_per_dimension(jnp.zeros((2, 3, 4, 2, 5)), x), math.log2(5), rel_tol=1e-6)
    logits = rng.normal(size=(2, 3, 4, 2, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.mean([-math.log2(p[(*place, x[place])]) for place in np.ndindex(2, 3, 4, 2)])
    found = jax.jit(bits_per_dimension)(jnp.asarray(logits, jnp.float32), x)
    assert math.isclose(found, expected, rel_tol=1e-5)


@pytest.mark.slow
def test_a_few_steps_on_digits_beat_the_histogram_of_each_pixel():
    datasets = pytest.importorskip("sklearn.datasets")
    x = datasets.load_digits().images.astype(np.int32)[..., None]
    rng = np.random.default_rng(0)
    x = jnp.asarray(x[rng.permutation(len(x))])
    train, test = x[:-96], x[-96:]
    counts = np.stack([np.sum(train == value, axis=0) for value in range(17)], axis=-1) + 0.5
    histogram = jnp.broadcast_to(jnp.log(jnp.asarray(counts)), (len(test), 8, 8, 1, 17))
    baseline = float(bits_per_dimension(histogram, test))

    model = AxialTransformer((8, 8), channels=1, num_values=17, features=24, num_heads=4, inner_depth=1)
    variables = jax.jit(model.init)(jax.random.key(0), test)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1.5e-2, 10, 85))

    def loss(variables, x):
        return bits_per_dimension(model.apply(variables, x), x)

    @jax.jit
    def step(variables, state, x):
        bits, gradient = jax.value_and_grad(loss)(variables, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, bits

    state = optimizer.init(variables)
    before = float(step(variables, state, test)[2])
    for _ in range(80):
        variables, state, _ = step(variables, state, train[rng.integers(0, len(train), 96)])
    after = float(step(variables, state, test)[2])
    print(f"bits a pixel: {before:.2f} before, {after:.2f} after, {baseline:.2f} by the histograms")
    # About log2(17) = 4.09 before.
    assert before > 3.5 > 2.6 > baseline > 2.3
    assert after < baseline - 0.15


def test_dropout_of_the_branches_is_random_in_training_alone():
    block = AxialBlock(num_heads=1, dropout_rate=0.5)
    x = normal(1, 2, 3, 4)
    variables = random_variables(block, x)
    train = jax.jit(lambda key: block.apply(variables, x, deterministic=False, rngs={"dropout": key}))
    first, second, again = (train(jax.random.key(seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    plain = [jax.jit(block.clone(dropout_rate=rate).apply)(variables, x) for rate in (0.0, 0.5)]
    np.testing.assert_array_equal(*plain)
    # Where all of a feature's branches are dropped, the input is left.
    assert np.any(np.isclose(first, x, atol=1e-6))


@pytest.mark.slow
def test_recomputation_changes_no_gradient_and_is_in_the_program():
    encoder = AxialEncoder(num_heads=1, depth=1)
    x = normal(2, 2, 3, 4)
    variables = random_variables(encoder, x)

    def gradient(name):
        return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(encoder.clone(remat=name).apply(v, x)))))

    expected, found = (gradient(name)(variables) for name in ("none", "full"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)

    images = values(1, 3, 4, 2)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), images)

    def program(name):
        def loss(v):
            return bits_per_dimension(SMALL.clone(remat=name).apply(v, images), images)

        return str(jax.make_jaxpr(jax.grad(loss))(shapes))

    assert [name for name in ("none", "attention", "full") if "remat" in program(name)] == ["attention", "full"]


# Variants and parameter trees ------------------------------------------------------------------------------------


def build(name):
    variant = axial_transformer.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return variant["module"](**fields), variant["inputs"]


@pytest.mark.parametrize("name", axial_transformer.VARIANTS)
def test_variants_have_the_layers_of_the_configurations(name):
    model, inputs = build(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    width, side = model.features, model.image_size[0]
    # Four products of attention, two of an MLP as wide as the features, with biases, and two norms.
    block = 4 * (width**2 + width) + 2 * (width**2 + width) + 4 * width
    tables = 2 * 2 * side * width + 256 * width
    ends = (3 * 3 * 6 * width + width) + 2 * width + (width * 256 + 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 24 * block + tables + ends


def test_resized_places_are_resampled_and_all_else_stays(small):
    variables, _, _ = small
    wide = SMALL.clone(image_size=(6, 4))
    params = axial_transformer.resize(variables["params"], SMALL, wide)
    expected = jax.eval_shape(wide.init, jax.random.key(0), values(1, 6, 4, 2))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    old, new = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (variables["params"], params))
    assert [path for path in old if old[path] is not new[path]] == [
        path for path in old if path.endswith("places/rows")
    ]
    back = axial_transformer.resize(params, wide, SMALL)["places"]["rows"]
    assert np.abs(back - variables["params"]["places"]["rows"]).max() < np.abs(back).max()
    assert jax.eval_shape(wide.apply, {"params": params}, values(1, 6, 4, 2)).shape == (1, 6, 4, 2, 5)
    with pytest.raises(ValueError, match="features=4 must equal the features=8 of the parameters"):
        axial_transformer.resize(params, wide, SMALL.clone(features=4))


def test_no_decay_marks_all_but_the_kernels(small):
    flat = flax.traverse_util.flatten_dict(axial_transformer.no_decay(small[0]["params"]))
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale", "embedding", "rows", "columns"}


def test_layer_ids_count_blocks_from_the_embeddings_to_the_head(small):
    ids = axial_transformer.layer_ids(small[0]["params"], SMALL)

    def of(tree):
        return set(jax.tree.leaves(tree))

    for name in ("token_embed", "places", "channel_embed", "channel_places"):
        assert of(ids[name]) == {0}
    parts = [ids["encoder"]["blocks_0"], ids["encoder"]["blocks_1"], ids["outer_blocks_0"], ids["outer_blocks_1"]]
    assert [of(part) for part in [*parts, ids["inner_blocks_0"], ids["inner_blocks_1"]]] == [{i} for i in range(1, 7)]
    assert of(ids["final_norm"]) == of(ids["head"]) == {7}

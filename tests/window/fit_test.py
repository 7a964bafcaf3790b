import dataclasses
import functools
import math
import re
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.nn.transformer_block import TransformerBlock
from jaxlayers.summary import count_macs
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import fit
from jaxlayers.window.fit import FIT, FITAR, FITBlock, FITDenoiser

GOLDEN = Path(__file__).parents[1] / "golden" / "fit_parity.npz"
BLOCK = FITBlock(depths=(1, 1), num_heads=(1, 2), mlp_ratio=2.0)
# Five by four patches in groups of two by two: the last row of groups is half padding.
TINY = FIT(
    num_classes=3,
    image_size=(10, 8),
    patch_size=2,
    group_size=2,
    latents_per_group=2,
    embed_dim=(4, 8),
    num_heads=(1, 2),
    layers="(1)1(1)",
    mlp_ratio=1.0,
)
DENOISER = FITDenoiser(
    image_size=(6, 4),
    patch_size=1,
    group_size=2,
    latents_per_group=2,
    embed_dim=(4, 16),
    num_heads=(1, 2),
    layers="(1)1(1)",
    mlp_ratio=1.0,
    self_condition=True,
)
CAUSAL = FITAR(
    vocab_size=7,
    group_size=3,
    num_groups=4,
    latents_per_group=2,
    embed_dim=(4, 8),
    num_heads=(1, 2),
    layers="(1)1(1)",
    mlp_ratio=1.0,
)
KEY_BIAS = {r"attention/key/bias$": "softmax does not see what all keys of a query have in common"}

CASES = (
    Case(
        name="fit_block",
        within="fit",
        module=BLOCK,
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 2, 8)), rng.normal(size=(2, 3, 5))),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"depths=\(1,\) and .* must be \(local, global\)", module=BLOCK.clone(depths=(1,))),
            BadInput(match=r"depths=\(-1, 1\) .* not negative", module=BLOCK.clone(depths=(-1, 1))),
            BadInput(match="features=4 must be divisible by num_heads=3", module=BLOCK.clone(num_heads=(3, 2))),
            BadInput(match="features=8 must be divisible by num_heads=3", module=BLOCK.clone(num_heads=(1, 3))),
            BadInput(
                match=r"same batch and groups; got shapes \(2, 3, 4, 4\) and \(2, 4, 2, 8\)",
                inputs=lambda rng: (np.ones((2, 3, 4, 4)), np.ones((2, 4, 2, 8))),
            ),
            BadInput(match=r"and None", inputs=lambda rng: (np.ones((2, 3, 4, 4)),)),
        ),
    ),
    Case(
        name="fit",
        # At the usual size of kernels, so few latents are so alike that what a token asks for hardly matters.
        module=TINY.clone(kernel_init=nn.initializers.normal(0.3)),
        inputs=lambda rng: (rng.normal(size=(2, 10, 8, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match=r"embed_dim=\(4,\) must be one positive number", module=TINY.clone(embed_dim=(4,))),
            BadInput(match="latents_per_group=0 must be positive", module=TINY.clone(latents_per_group=0)),
            BadInput(match=r"layers='2\(4\)' must be like", module=TINY.clone(layers="2(4)")),
            BadInput(match=r"layers='\(2\)\(4\)' must be like", module=TINY.clone(layers="(2)(4)")),
            BadInput(match=r"patch_size=\(2, 2, 2\) must be a positive int or", module=TINY.clone(patch_size=(2,) * 3)),
            BadInput(match="group_size=0 must be a positive int or", module=TINY.clone(group_size=0)),
            BadInput(match=r"rate=1.5 must lie in", module=TINY.clone(drop_path_rate=1.5)),
            BadInput(
                match=r"spatial size \(8, 8\) must be image_size=\(10, 8\); resize the inputs, or the parameters",
                inputs=lambda rng: (np.ones((1, 8, 8, 3)),),
            ),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 10, 8, 3), int),)),
        ),
    ),
    Case(
        name="fit_denoiser",
        module=DENOISER,
        inputs=lambda rng: (
            rng.normal(size=(2, 6, 4, 3)),
            # Exact in bfloat16, of which the sines of a thousandfold would tell.
            rng.integers(1, 8, size=2) / 8,
            rng.normal(size=(2, 3, 5)),
            rng.normal(size=(2, 6, 2, 16)),
        ),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match=r"must have global layers, which hear of", module=DENOISER.clone(layers="(2)")),
            BadInput(match="latents of a multiple of 4, at least 16", module=DENOISER.clone(embed_dim=(4, 18))),
            BadInput(match="need self_condition=True", module=DENOISER.clone(self_condition=False)),
            BadInput(
                match=r"must be of the batch \(2,\) of x; got shapes \(3,\)",
                inputs=lambda rng: (np.ones((2, 6, 4, 3)), np.ones((3,))),
            ),
            BadInput(
                match=r"latents of an earlier call must have shape \(2, 6, 2, 16\); got \(2, 6, 1, 16\)",
                inputs=lambda rng: (np.ones((2, 6, 4, 3)), np.ones((2,)), np.ones((2, 1, 5)), np.ones((2, 6, 1, 16))),
            ),
        ),
    ),
    Case(
        name="fit_ar",
        module=CAUSAL,
        inputs=lambda rng: (rng.integers(7, size=(2, 8)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="vocab_size=0 must be positive", module=CAUSAL.clone(vocab_size=0)),
            BadInput(match="must end with local layers", module=CAUSAL.clone(layers="(1)1")),
            BadInput(match="of length 13 must hold 1 to 12 tokens", inputs=lambda rng: (np.ones((1, 13), int),)),
            BadInput(match="dtype float32 must be integers", inputs=lambda rng: (np.ones((1, 8)),)),
        ),
    ),
)


def random_params(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        return jnp.asarray(0.5 * rng.normal(size=leaf.shape) + ("scale" in str(path[-1])), dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def silence(params, name):
    """Return the parameters with the output of every attention called `name` zero."""
    flat = flax.traverse_util.flatten_dict(params)
    silent = {path: 0 * leaf if name in path and "out" in path else leaf for path, leaf in flat.items()}
    assert any(name in path for path in flat)
    return flax.traverse_util.unflatten_dict(silent)


@pytest.fixture
def tokens(rng):
    """Four tokens and two latents of each of three groups."""
    shapes = (1, 3, 4, 4), (1, 3, 2, 8)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.fixture(scope="module")
def tiny():
    """A small encoder's parameters, images of its size, and the logits."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 8, 3)), jnp.float32)
    params = random_params(TINY, x)
    return params, x, jax.jit(TINY.apply)({"params": params}, x)


# An independent twin: NumPy, group by group and query by query ----------------------------------------------------


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def twin_attention(p, x, context, num_heads, sees):
    """Attention of the rows of `x` to those rows of `context` that `sees` lists for each."""
    query, key, value = linear(p["query"], x), linear(p["key"], context), linear(p["value"], context)
    dim = query.shape[-1] // num_heads
    out = np.zeros_like(query)
    for row in range(len(x)):
        for head in range(num_heads):
            part = slice(head * dim, (head + 1) * dim)
            weights = np.exp([query[row, part] @ key[other, part] / math.sqrt(dim) for other in sees(row)])
            out[row, part] = sum(w * value[other, part] for w, other in zip(weights, sees(row), strict=True))
            out[row, part] /= weights.sum()
    return linear(p["out"], out)


def twin_transformer(p, x, num_heads, sees):
    y = norm(p["norm1"], x)
    x = x + twin_attention(p["attention"], y, y, num_heads, sees)
    hidden = linear(p["feed_forward"]["up"], norm(p["norm2"], x))
    hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(p["feed_forward"]["down"], hidden)


def twin_cross(p, x, context, num_heads):
    everything = range(len(context))
    query, answer = norm(p["query_norm"], x), norm(p["context_norm"], context)
    return x + twin_attention(p["attention"], query, answer, num_heads, lambda row: everything)


def twin_block(p, x, latents, conditions, *, causal):
    groups, n, m = x.shape[0], x.shape[1], latents.shape[1]

    def local(row):
        return range(row + 1) if causal else range(n)

    def wide(row):
        return range((row // m + 1) * m) if causal else range(groups * m)

    x = [twin_transformer(p["local_0"], one, 1, local) for one in x]
    latents = [twin_cross(p["read"], z, one, 1) for z, one in zip(latents, x, strict=True)]
    every = np.concatenate(latents)
    if conditions is not None:
        every = twin_cross(p["condition"], every, conditions, 2)
    every = twin_transformer(p["global_0"], every, 2, wide)
    latents = np.split(every, groups)
    seen = [np.zeros_like(latents[0]), *latents[:-1]] if causal else latents
    return np.stack([twin_cross(p["write"], one, z, 1) for one, z in zip(x, seen, strict=True)]), np.stack(latents)


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_a_loop_over_groups(causal, tokens, rng):
    block = BLOCK.clone(causal=causal)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(np.asarray(one, np.float64)) for one in (*tokens, rng.normal(size=(1, 3, 5)))]
        inputs = inputs[:2] if causal else inputs
        params = random_params(block, *inputs, dtype=np.float64)
        found = jax.jit(block.apply)({"params": params}, *inputs)
    x, latents, *rest = (np.asarray(one)[0] for one in inputs)
    expected = twin_block(jax.tree.map(np.asarray, params), x, latents, *(rest or [None]), causal=causal)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other, atol=1e-11)


def test_noise_embedding_is_sines_then_cosines_of_mean_zero_and_variance_one():
    level, features = np.array([0.0, 0.013, 0.7]), 6
    rows = []
    for t in level:
        code = [math.sin(1000 * t / 10000 ** (i / features)) for i in (0, 2, 4)]
        code += [math.cos(1000 * t / 10000 ** (i / features)) for i in (0, 2, 4)]
        rows.append((np.array(code) - np.mean(code)) / np.std(code))
    found = fit.noise_embedding(jnp.asarray(level, jnp.float32), features)
    np.testing.assert_allclose(found, rows, atol=1e-4)


# The authors' code, see `provenance` in the stored arrays -----------------------------------------------------------

SIGNAL = {
    "image_size": 24,
    "patch_size": (2,),
    "group_size": (3,),
    "latents_per_group": 2,
    "embed_dim": (16, 16),
    "num_heads": (2, 4),
    "layers": "(1)1(1)",
    "mlp_ratio": 1.0,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "google-research/pix2seq" in str(stored["provenance"])
        arrays = {name: jnp.asarray(stored[name]) for name in stored.files if name != "provenance"}
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def test_encoder_is_the_official_one(golden):
    model = FIT(num_classes=0, **SIGNAL)

    @jax.jit
    def run(params, x):
        x, _ = nn.apply(FIT.tokens, model)({"params": params}, x)
        return fit.layer_norm().apply({"params": params["final_norm"]}, x)

    found = run(golden["fit"]["params"], golden["signal"])
    np.testing.assert_allclose(found, golden["fit"]["tokens"], atol=1e-4)


def test_denoiser_is_the_official_one(golden):
    model, given = FITDenoiser(self_condition=True, **SIGNAL), golden["denoiser"]
    run = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    output, latents = run(given["params"], golden["signal"], given["time"], given["conditions"], given["previous"])
    np.testing.assert_allclose(output, given["output"], atol=1e-4)
    np.testing.assert_allclose(latents, given["latents"], atol=1e-4)


def test_causal_decoder_is_the_official_one(golden):
    fields = {name: value for name, value in SIGNAL.items() if name not in ("image_size", "patch_size", "group_size")}
    model, given = FITAR(vocab_size=7, group_size=3, num_groups=4, **fields), golden["ar"]
    found = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))(given["params"], given["tokens"])
    np.testing.assert_allclose(found, given["logits"], atol=1e-4)


# Limiting cases ----------------------------------------------------------------------------------------------------


def test_one_group_without_latents_is_a_plain_transformer(rng):
    model = TINY.clone(layers="(2)", group_size=(5, 4), num_classes=3)
    x = jnp.asarray(rng.normal(size=(2, 10, 8, 3)), jnp.float32)
    params = random_params(model, x)
    assert "latents" not in params
    assert set(params["stages_0"]) == {"local_0", "local_1"}

    @jax.jit
    def vit(x):
        patches = x.reshape(2, 5, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 20, 12)
        projection, post_norm = params["patch_embed"]["projection"], params["patch_embed"]["post_norm"]
        y = patches @ projection["kernel"] + projection["bias"]
        y = fit.layer_norm().apply({"params": post_norm}, y) + params["position_embedding"]
        for name in ("local_0", "local_1"):
            y = TransformerBlock(1, mlp_ratio=1.0).apply({"params": params["stages_0"][name]}, y)
        y = fit.layer_norm().apply({"params": params["final_norm"]}, y).mean(-2)
        return nn.Dense(3).apply({"params": params["head"]}, y)

    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), vit(x), atol=1e-5)


def test_blocks_without_global_layers_leave_the_latents_alone(tokens):
    x, latents = tokens
    block = BLOCK.clone(depths=(1, 0))
    params = jax.eval_shape(block.init, jax.random.key(0), x, latents)
    kept = []
    jax.eval_shape(lambda params, x: kept.append(block.apply(params, x, latents)[1]), params, x)
    assert kept[0] is latents


# What the paper claims ---------------------------------------------------------------------------------------------


@functools.cache
def jacobian_of(block):
    weights = np.random.default_rng(5).normal(size=4).astype(np.float32)
    return jax.jit(
        lambda params, x, latents: jax.jacrev(lambda x: block.apply({"params": params}, x, latents)[0] @ weights)(x)
    )


def group_jacobian(block, params, x, latents):
    """Return which token [row] depends on which [column], both numbered by (group, token)."""
    jacobian = np.asarray(jacobian_of(block)(params, x, latents))[0, :, :, 0]
    return np.any(jacobian != 0, axis=-1).reshape(12, 12)


def test_other_groups_reach_a_token_through_latents_alone(tokens):
    params = random_params(BLOCK, *tokens)
    same = np.kron(np.eye(3, dtype=bool), np.ones((4, 4), bool))
    np.testing.assert_array_equal(group_jacobian(BLOCK, silence(params, "write"), *tokens), same)
    np.testing.assert_array_equal(group_jacobian(BLOCK, silence(params, "read"), *tokens), same)
    np.testing.assert_array_equal(group_jacobian(BLOCK.clone(writes=False), params, *tokens), same)
    # And the twin: with all three links every token reaches every other.
    assert group_jacobian(BLOCK, params, *tokens).all()


def test_pixels_stay_in_their_group_unless_latents_write(tiny):
    params, x, _ = tiny
    run = jax.jit(lambda params, x: nn.apply(FIT.features, TINY)({"params": params}, x)[0].array)
    silent = silence(params, "write")
    plain, full = run(silent, x), run(params, x)
    assert plain.shape == (2, 5, 4, 4)
    for row, column in [(0, 0), (3, 4), (9, 7), (8, 0)]:
        moved = x.at[0, row, column].add(jnp.array([1.0, -3.0, 2.0]))
        changed = np.any(np.asarray(run(silent, moved) != plain)[0], axis=-1)
        expected = np.zeros((5, 4), bool)
        first, left = 2 * (row // 4), 2 * (column // 4)
        expected[first : first + 2, left : left + 2] = True
        np.testing.assert_array_equal(changed, expected)
        assert np.any(np.asarray(run(params, moved) != full)[0], axis=-1).all()


def test_block_commutes_with_permutations_of_the_groups(tokens, rng):
    x, latents = tokens
    params = random_params(BLOCK, x, latents)
    run = jax.jit(lambda *inputs: BLOCK.apply({"params": params}, *inputs))
    expected = run(x, latents)
    order = np.array([2, 0, 1])
    for found, wanted in zip(run(x[:, order], latents[:, order]), expected, strict=True):
        np.testing.assert_allclose(found, wanted[:, order], atol=1e-5)
    # Negative controls: latents must go with their groups, and a causal block knows the order.
    assert np.abs(run(x[:, order], latents)[0] - expected[0][:, order]).max() > 0.01
    causal = jax.jit(lambda *inputs: BLOCK.clone(causal=True).apply({"params": params}, *inputs)[0])
    assert np.abs(causal(x[:, order], latents[:, order]) - causal(x, latents)[:, order]).max() > 0.01


def test_causal_decoder_sees_all_earlier_and_no_later_tokens():
    model = CAUSAL.clone(layers="(1)1(0)1(1)")
    length = 11
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(length, 4)), jnp.float32)
    params = random_params(model, jnp.zeros((length,), jnp.int32))
    weights = jnp.asarray(rng.normal(size=7), jnp.float32)
    jacobian = jax.jit(jax.jacrev(lambda x: nn.apply(FITAR.decode, model)({"params": params}, x) @ weights))(x)
    reached = np.any(np.asarray(jacobian) != 0, axis=-1)
    # Of its inputs, which are the shifted tokens, place i sees 0 to i: the tokens before the one it predicts.
    np.testing.assert_array_equal(reached, np.tri(length, dtype=bool))


@pytest.fixture(scope="module")
def causal():
    """Parameters of the small decoder, tokens of its full length, and the compiled model."""
    tokens = jnp.asarray(np.random.default_rng(6).integers(7, size=(1, 12)), jnp.int32)
    return (
        random_params(CAUSAL, tokens),
        tokens,
        jax.jit(lambda params, tokens: CAUSAL.apply({"params": params}, tokens)),
    )


def test_predictions_depend_on_no_token_from_their_own_on(causal):
    params, tokens, run = causal

    def changed(place, prepare):
        moved = tokens.at[0, place].set((tokens[0, place] + 1) % 7)
        return np.any(np.asarray(run(params, prepare(moved)) != run(params, prepare(tokens)))[0], axis=-1)

    for place in (0, 2, 3, 7, 11):
        np.testing.assert_array_equal(changed(place, fit.shift_right), np.arange(12) > place)
        # Negative control: without the shift the model reads what it is to predict.
        np.testing.assert_array_equal(changed(place, lambda tokens: tokens), np.arange(12) >= place)


def test_write_of_the_own_groups_latents_would_leak(tokens):
    x, latents = tokens
    causal = BLOCK.clone(causal=True)
    params = random_params(causal, x, latents)
    order = np.tri(12, dtype=bool)
    found = group_jacobian(causal, params, x, latents)
    # A single block: what a token learns of earlier groups is what their tokens said before, so all of them reach.
    np.testing.assert_array_equal(found, order)
    # Negative control: the same parameters with masks and shift left out.
    assert (group_jacobian(BLOCK, params, x, latents) & ~order).any()


def test_a_short_sequence_is_the_beginning_of_a_long_one(causal):
    params, tokens, run = causal
    np.testing.assert_allclose(run(params, tokens[:, :7]), run(params, tokens)[:, :7], atol=1e-5)


def test_one_causal_group_is_a_plain_causal_transformer(rng):
    model = CAUSAL.clone(layers="(2)", group_size=9, num_groups=1, shared_embedding=False)
    tokens = jnp.asarray(rng.integers(7, size=(2, 9)), jnp.int32)
    params = random_params(model, tokens)
    p = jax.tree.map(np.asarray, params)
    found = jax.jit(model.apply)({"params": params}, tokens)
    for row, logits in zip(np.asarray(tokens), found, strict=True):
        x = p["token_embed"]["embedding"][row] + p["position_embedding"]
        for name in ("local_0", "local_1"):
            x = twin_transformer(p["stages_0"][name], x, 1, lambda query: range(query + 1))
        np.testing.assert_allclose(logits, linear(p["head"], norm(p["final_norm"], x)), atol=1e-4)


def attention_macs(length, group):
    """Multiply-accumulates of one local and one global layer of widths one, without those linear in the length."""
    block = FITBlock(depths=(1, 1), num_heads=(1, 1), mlp_ratio=1.0)
    groups = length // group
    x, latents = jnp.zeros((groups, group, 1)), jnp.zeros((groups, 1, 1))
    params = jax.eval_shape(block.init, jax.random.key(0), x, latents)
    total = count_macs(block.apply, params, x, latents)
    # Local, then global layer: four projections and two products of the MLP; read and write: two projections of
    # queries and outputs, two of the context, and two products of one latent with its group.
    linear_in_length = (4 + 2) * length + (4 + 2) * groups + 2 * (2 * length + 2 * groups + 2 * length)
    return total - linear_in_length


def test_attention_costs_the_four_thirds_power_of_the_length():
    # Groups of the cube root of the length balance the two.
    costs = {length: attention_macs(length, round(length ** (1 / 3))) for length in (8**3, 16**3, 32**3)}
    for length, cost in costs.items():
        group = round(length ** (1 / 3))
        assert cost == 2 * length * group + 2 * (length // group) ** 2 == 4 * round(length ** (4 / 3))
    # Eight times the length: sixteen times the cost; of attention among all tokens, sixty-four times.
    dense = TransformerBlock(1, mlp_ratio=1.0)

    def dense_macs(length):
        x = jax.ShapeDtypeStruct((length, 1), jnp.float32)
        params = jax.eval_shape(dense.init, jax.random.key(0), x)
        return count_macs(dense.apply, params, x) - 6 * length

    assert [costs[16**3] // costs[8**3], costs[32**3] // costs[16**3]] == [16, 16]
    assert dense_macs(16**3) == 64 * dense_macs(8**3)


# Sharding over groups ------------------------------------------------------------------------------------------------

RULES = (
    (axes.BATCH, "data"),
    (axes.HEADS, None),
    (axes.HIDDEN, None),
    (axes.TOKENS, "sequence"),
    (axes.WINDOWS, "sequence"),
    (axes.FEATURES, None),
)


def test_local_layers_split_over_groups_need_no_communication(rng):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.asarray(rng.normal(size=(2, 4, 4, 4)), np.float32)
    latents = np.asarray(rng.normal(size=(2, 4, 2, 8)), np.float32)
    place = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    collective = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)")
    # With global layers the same search must find something.
    for depths, causal, talks in (((1, 0), False, False), ((1, 1), True, True)):
        block = BLOCK.clone(depths=depths, causal=causal)
        params = random_params(block, x, latents)
        expected = jax.jit(block.apply)({"params": params}, x, latents)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            inputs = jax.device_put((x, latents), place)
            compiled = jax.jit(block.apply).lower({"params": params}, *inputs).compile()
            found = compiled({"params": params}, *inputs)
        assert bool(collective.search(compiled.as_text())) is talks
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert one.sharding.spec[:2] == ("data", "sequence")


# The models ------------------------------------------------------------------------------------------------------


def test_features_of_signals_and_volumes_have_their_shape():
    for group, size, patch in (((4,), (13,), (3,)), ((2, 1, 2), (3, 4, 5), (1, 2, 1))):
        model = TINY.clone(group_size=group, image_size=size, patch_size=patch)
        x = jnp.ones((2, *size, 2))
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        (level,) = jax.eval_shape(nn.apply(FIT.features, model), variables, x)
        assert level.stride == patch
        assert level.array.shape == (2, *(-(-length // step) for length, step in zip(size, patch, strict=True)), 4)


def test_head_reads_latents_where_the_model_ends_with_global_layers(tiny):
    _, x, _ = tiny
    model = TINY.clone(layers="(1)1")
    params = random_params(model, x)
    assert "write" not in params["stages_0"]

    @jax.jit
    def run(x):
        return model.apply({"params": params}, x), nn.apply(FIT.tokens, model)({"params": params}, x)[1]

    logits, latents = run(x)
    pooled = fit.layer_norm().apply({"params": params["final_norm"]}, latents).mean((-3, -2))
    np.testing.assert_allclose(logits, nn.Dense(3).apply({"params": params["head"]}, pooled), atol=1e-5)


@pytest.fixture(scope="module")
def denoised():
    """Parameters of the small denoiser, its inputs without latents, and the compiled model."""
    rng = np.random.default_rng(4)
    inputs = (rng.normal(size=(2, 6, 4, 3)), rng.uniform(size=2), rng.normal(size=(2, 3, 5)))
    inputs = tuple(jnp.asarray(one, jnp.float32) for one in inputs)
    run = jax.jit(lambda params, *inputs: DENOISER.apply({"params": params}, *inputs))
    return random_params(DENOISER, *inputs), inputs, run


def test_denoiser_hears_the_noise_level_and_the_conditions_in_any_order(denoised):
    params, (x, time, conditions), run = denoised
    start = jnp.zeros((2, 6, 2, 16))
    plain, _ = run(params, x, time, conditions, start)
    assert plain.shape == x.shape
    np.testing.assert_allclose(run(params, x, time, conditions[:, ::-1], start)[0], plain, atol=1e-4)
    moved = conditions.at[:, 0].add(1.0)
    for other in (run(params, x, time + 0.1, conditions, start)[0], run(params, x, time, moved, start)[0]):
        assert np.all(np.abs(other - plain).max((1, 2, 3)) > 1e-3)


def test_denoiser_without_conditions_hears_of_the_noise_level_alone(denoised):
    _, (x, time, _), _ = denoised
    model = DENOISER.clone(self_condition=False)
    params = random_params(model, x, time)
    assert not {"condition_projection", "previous"} & set(params)
    run = jax.jit(lambda time: model.apply({"params": params}, x, time)[0])
    assert np.abs(run(time) - run(time + 0.1)).max() > 1e-3


def test_self_conditioning_starts_silent_and_then_speaks(denoised):
    params, inputs, run = denoised
    zeros = jnp.zeros((2, 6, 2, 16))
    plain, latents = run(params, *inputs, zeros)
    assert latents.shape == zeros.shape
    assert np.abs(run(params, *inputs, latents)[0] - plain).max() > 1e-3
    # Its norm's scale and bias start at zero.
    fields = {name: getattr(DENOISER, name) for name in ("norm", "dtype", "param_dtype", "kernel_init", "bias_init")}
    silent = fit._Previous(1.0, **fields).init(jax.random.key(0), latents)["params"]["post_norm"]
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), silent)
    fresh = {**params, "previous": {**params["previous"], "post_norm": silent}}
    np.testing.assert_array_equal(run(fresh, *inputs, latents)[0], run(fresh, *inputs, zeros)[0])


def test_variants_have_the_sizes_they_are_named_for():
    model = FIT(**{key: value for key, value in fit.VARIANTS["fit_6400"].items() if key not in ("module", "inputs")})
    patch, group, grid = fit._places(model)
    assert math.prod(group) * math.prod(grid) == (6400 // patch[0]) ** 2 == 160_000
    assert FITAR().group_size * FITAR().num_groups == 64 * 64 * 3


def test_drop_path_drops_groups_of_samples_in_local_layers():
    block = BLOCK.clone(depths=(2, 0), drop_path_rate=0.5)
    x = jnp.ones((50, 4, 2, 4))
    params = random_params(block, x)
    state = jax.jit(
        lambda key: block.apply(
            {"params": params},
            x,
            deterministic=False,
            rngs={"dropout": key},
            capture_intermediates=lambda module, _: type(module).__name__ == "DropPath",
        )[1]["intermediates"]
    )(jax.random.key(0))
    outputs = [one for path, one in flax.traverse_util.flatten_dict(state).items() if path[-1] == "__call__"]
    assert len(outputs) == 2
    for output in outputs:
        lost = np.mean([np.all(np.asarray(one) == 0, axis=(-2, -1)) for one in output])
        assert abs(lost - 0.5) < 0.1


@pytest.mark.slow
def test_remat_changes_neither_outputs_nor_gradients(rng):
    # Causal, so that a mask is made within what is computed again.
    block = BLOCK.clone(causal=True, num_heads=(1, 1), mlp_ratio=1.0, writes=False)
    tokens = tuple(jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.float32) for _ in range(2))
    params = random_params(block, *tokens)

    def run(policy):
        return jax.value_and_grad(
            lambda p: sum(jnp.sum(jnp.sin(one)) for one in block.clone(remat=policy).apply({"params": p}, *tokens))
        )

    plain, found = jax.jit(run("none"))(params), jax.jit(run("full"))(params)
    assert str(jax.make_jaxpr(run("full"))(params)).count("remat") >= 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), found, plain)


def test_softmax_and_norm_statistics_stay_in_float32_under_bfloat16(tokens):
    inputs = [one.astype(jnp.bfloat16) for one in tokens]
    for block in (BLOCK.clone(dtype=jnp.bfloat16), BLOCK.clone(dtype=jnp.bfloat16, causal=True)):
        program = str(jax.make_jaxpr(block.apply)({"params": random_params(block, *inputs)}, *inputs))
        assert re.search(r":f32\[[\d,]*\] = exp ", program)
        assert not re.search(r":bf16\[[\d,]*\] = (exp|rsqrt|reduce_max) ", program)
        assert not re.search(r":f32\[[\d,]*\] = dot_general", program)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_resize_fits_latents_and_positions_and_leaves_the_rest(tiny):
    params, _, _ = tiny
    target = TINY.clone(image_size=(16, 20), group_size=(2, 3), drop_path_rate=0.5)
    resized = fit.resize(params, TINY, target)
    shapes = jax.eval_shape(target.init, jax.random.key(0), jnp.ones((1, 16, 20, 3)))["params"]
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)
    assert {name for name in params if resized[name] is not params[name]} == {"latents", "position_embedding"}
    flat = fit.resize({**params, "latents": jnp.ones((6, 2, 8))}, TINY, target)
    np.testing.assert_allclose(flat["latents"], 1.0, atol=1e-6)
    # What varies along the rows of groups alone varies along the new rows alone.
    rows = jnp.broadcast_to(jnp.arange(3.0)[:, None, None, None], (3, 2, 2, 8)).reshape(6, 2, 8)
    found = fit.resize({**params, "latents": rows}, TINY, target)["latents"].reshape(4, 4, 2, 8)
    np.testing.assert_allclose(found, jnp.broadcast_to(found[:, :1, :1, :1], found.shape), atol=1e-6)
    assert np.all(np.diff(found[:, 0, 0, 0]) > 0)
    jax.tree.map(np.testing.assert_array_equal, fit.resize(params, TINY, TINY.clone(image_size=(12, 7))), params)


@pytest.mark.parametrize("change", [{"patch_size": 1}, {"layers": "(1)1"}, {"num_classes": 2}])
def test_resize_refuses_what_it_cannot_bridge(tiny, change):
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=re.escape(f"{field}={value} must equal the {field}={getattr(TINY, field)}")):
        fit.resize(tiny[0], TINY, TINY.clone(**change))
    with pytest.raises(ValueError, match="FITDenoiser must be a FIT"):
        fit.resize(tiny[0], TINY, DENOISER)
    with pytest.raises(ValueError, match="as many axes as group_size=2"):
        fit.resize(tiny[0], TINY, TINY.clone(group_size=(2, 2, 2), image_size=8))


def test_no_decay_spares_kernels_alone(tiny):
    flat = flax.traverse_util.flatten_dict(fit.no_decay(tiny[0]))
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert {path[-1] for path, without in flat.items() if without} == {
        "bias",
        "scale",
        "latents",
        "position_embedding",
    }


def test_layer_ids_count_local_and_global_layers():
    model = TINY.clone(layers="(2)1(1)1")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 10, 8, 3)))["params"]
    ids = fit.layer_ids(params, model)
    found = {name: set(jax.tree.leaves(tree)) for name, tree in ids.items() if not name.startswith("stages_")}
    ends = {"final_norm": {6}, "head": {6}}
    assert found == {"patch_embed": {0}, "position_embedding": {0}, "latents": {0}, **ends}
    stages = [{name: set(jax.tree.leaves(tree)) for name, tree in ids[f"stages_{i}"].items()} for i in (0, 1)]
    assert stages[0] == {"local_0": {1}, "local_1": {2}, "read": {2}, "global_0": {3}, "write": {3}}
    assert stages[1] == {"local_0": {4}, "read": {4}, "global_0": {5}}


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("(2)4(2)", ((2, 4), (2, 0))), ("(3)", ((3, 0),)), ("(1)2(0)4", ((1, 2), (0, 4))), ("(1)0", ((1, 0),))],
)
def test_layers_are_read_as_in_the_paper(layers, blocks):
    assert fit.parse_layers(layers) == blocks


@pytest.mark.parametrize("layers", ["", "4", "(2)0(2)", "(2)4)", "(-1)2", "(2) 4"])
def test_layers_of_another_form_are_refused(layers):
    with pytest.raises(ValueError, match="must be like"):
        fit.parse_layers(layers)


def test_own_fields_stay_few():
    others = {"parent", "name", "dtype", "param_dtype", "kernel_init", "bias_init"}
    for cls in (FIT, FITAR, FITBlock, FITDenoiser):
        assert len({field.name for field in dataclasses.fields(cls)} - others) <= 13

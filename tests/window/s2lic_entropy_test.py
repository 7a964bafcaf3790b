"""The entropy model's parts, its order, and golden arrays of public code.

`tests/golden/s2lic_parity.npz` holds weights, inputs and outputs, all drawn with seed 0, of `EntropyBottleneck` (4
features) and the likelihood of `GaussianConditional` in `compressai/entropy_models/entropy_models.py` of
github.com/InterDigitalInc/CompressAI at 869a9f5, its compiled coder left out, and of `EnhBlock(8)` with a growth of 4
in `codes/compressai/models/our_utils.py` of github.com/xyq7/InvCompress at cc68eac; PyTorch 2.13 on a CPU. S2LIC's own
code cannot be run: its layers are not public.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.testing import BadInput, Case
from jaxlayers.window.s2lic_entropy import (
    SCALES,
    ACGCEntropyModel,
    ChannelwiseContext,
    FactorizedPrior,
    GlobalInterContext,
    checkerboard,
    gaussian_bits,
    gaussian_tables,
    scale_index,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "s2lic_parity.npz"
TINY = ACGCEntropyModel(features=8, num_slices=2, head_dim=4)


def map_of(*shape):
    return lambda rng: (rng.normal(size=shape),)


CASES = (
    Case(
        name="factorized_prior",
        within="s2lic",
        module=FactorizedPrior(),
        inputs=map_of(2, 3, 4),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"must be \[\*batch, features\]", inputs=lambda rng: (np.float32(1.0),)),
            BadInput(match="init_scale=0.0 must be positive", module=FactorizedPrior(init_scale=0.0)),
            BadInput(match=r"hidden_features=\(0,\) and", module=FactorizedPrior((0,))),
        ),
    ),
    Case(
        name="channelwise_context",
        within="s2lic",
        module=ChannelwiseContext(6, hidden_features=5),
        inputs=map_of(2, 3, 4, 8),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="features=0 and hidden_features=192 must be positive", module=ChannelwiseContext(0)),
            BadInput(match="must be a map", inputs=map_of(4, 8)),
        ),
    ),
    Case(
        name="global_inter_context",
        within="s2lic",
        module=GlobalInterContext(6, head_dim=4),
        inputs=map_of(2, 3, 4, 8),
        leading_axes=True,
        zero_gradients={r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"},
        bad_inputs=(
            BadInput(match="features=8 must be divisible by head_dim=3", module=GlobalInterContext(6, head_dim=3)),
            BadInput(match="reference_stride=0 must be positive", module=GlobalInterContext(6, reference_stride=0)),
            BadInput(match="must be a map", inputs=map_of(4, 8)),
        ),
    ),
    Case(
        name="acgc_entropy_model",
        within="s2lic",
        module=TINY,
        # Halves of whole numbers are far from where rounding jumps.
        inputs=lambda rng: (0.3 * rng.normal(size=(2, 4, 4, 8)), rng.normal(size=(2, 4, 4, 16))),
        leading_axes=True,
        zero_gradients={r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"},
        bad_inputs=(
            BadInput(match="features=8 must be divisible by num_slices=3", module=TINY.clone(num_slices=3)),
            BadInput(match="a slice of 4 features must be divisible by head_dim=3", module=TINY.clone(head_dim=3)),
            BadInput(match="twice as wide", inputs=lambda rng: (np.ones((1, 4, 4, 8)), np.ones((1, 4, 4, 8)))),
        ),
    ),
)


def random_params(module, *inputs, seed=0, method=None):
    shapes = jax.eval_shape(module.init, {"params": jax.random.key(0)}, *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]) + 1), jnp.float32),
        shapes,
    )


# Rates -----------------------------------------------------------------------------------------------------------


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_gaussian_bits_are_those_of_the_interval_and_finite_far_out():
    for scale in (0.11, 1.0, 30.0):
        for distance in (0.0, 0.4, -2.0, 3.5 * scale):
            lower, upper = (phi((-abs(distance) + half) / scale) for half in (-0.5, 0.5))
            found = gaussian_bits(jnp.float32(distance), jnp.float32(scale))
            np.testing.assert_allclose(found, -math.log2(upper - lower), rtol=1e-4, atol=1e-5)
    far, slope = jax.value_and_grad(lambda x: gaussian_bits(x, jnp.float32(0.11)))(jnp.float32(50.0))
    u = 49.5 / 0.11
    np.testing.assert_allclose(far, (u * u / 2 + math.log(u * math.sqrt(2 * math.pi))) / math.log(2), rtol=1e-5)
    np.testing.assert_allclose(slope, u / 0.11 / math.log(2), rtol=1e-3)


def test_tables_give_each_symbol_the_models_bits():
    tables = gaussian_tables()
    for index in (0, 10, 30, 50):
        reach = math.ceil(3 * SCALES[index])
        symbols = np.arange(-reach, reach + 1)
        exact = np.array([phi((-abs(k) + 0.5) / SCALES[index]) - phi((-abs(k) - 0.5) / SCALES[index]) for k in symbols])
        found = tables.bits(symbols, np.full(len(symbols), index))
        # What a symbol costs on the mean; a rare one has a coarse frequency.
        np.testing.assert_allclose(np.sum(exact * (found + np.log2(exact))), 0, atol=0.02)
        other = tables.bits(symbols, np.full(len(symbols), index + 8))
        assert np.sum(exact * (other - found)) > 0.01


def test_scale_index_finds_the_nearest_entry():
    np.testing.assert_array_equal(scale_index(jnp.array(SCALES, jnp.float32)), np.arange(len(SCALES)))
    np.testing.assert_array_equal(scale_index(jnp.array([1e-9, 0.118, 1e9])), [0, 1, 63])


def test_factorized_prior_is_a_distribution_for_any_parameters():
    prior = FactorizedPrior(init_scale=2.0)
    numbers = jnp.broadcast_to(jnp.arange(-400, 401.0)[:, None], (801, 3))
    for seed in range(3):
        params = jax.tree.map(lambda leaf: 2 * leaf, random_params(prior, numbers, seed=seed))
        mass = 2.0 ** -np.asarray(prior.apply({"params": params}, numbers), np.float64)
        assert np.all(mass >= 0)
        np.testing.assert_allclose(mass.sum(axis=0), 1, atol=2e-3)
    # Shared by all places, one for each feature.
    assert np.ptp(mass, axis=1).max() > 1e-3


# Order -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["figure", "code"])
def asked(request):
    """What mean and scale of each entry depend on: |d (mu + sigma) / d y'|, of slices and kinds of places."""
    model = TINY.clone(anchor_context=request.param)
    rng = np.random.default_rng(0)
    y, hyper = (jnp.asarray(rng.normal(size=(1, 4, 4, width)), jnp.float32) for width in (8, 16))
    params = random_params(model, y, hyper)

    @functools.partial(jax.jit, static_argnames="step")
    def jacobian(y, hyper, step):
        def told(y, hyper):
            return sum(model.apply({"params": params}, hyper, y, step, method="parameters"))

        return jax.jacobian(told, argnums=(0, 1))(y, hyper)

    return request.param, [[np.abs(np.asarray(one)) for one in jacobian(y, hyper, step=step)] for step in range(4)]


def test_no_entry_sees_what_is_decoded_with_it_or_later_and_it_sees_the_rest(asked):
    with_anchors, jacobians = asked
    anchors = checkerboard((4, 4))
    for step, (by_latent, by_hyper) in enumerate(jacobians):
        by_latent = by_latent[0, :, :, :, 0]
        here = anchors == (step % 2 == 0)
        sees = by_latent[here].max(axis=(0, 1))  # [height, width, channels] that some entry of the step depends on
        slices = {0: sees[..., :4], 1: sees[..., 4:]}
        for index, part in slices.items():
            if index < step // 2:
                assert np.all(part.max(axis=-1) > 0), "every place of an earlier slice, by the global attention"
            elif index == step // 2 and step % 2 and with_anchors:
                assert np.all(part[anchors].max(axis=-1) > 0), "the anchors of its slice"
                np.testing.assert_array_equal(part[~anchors], 0)
            else:
                np.testing.assert_array_equal(part, 0)
        assert by_hyper.max() > 0


def test_refining_changes_the_places_of_the_step_alone_and_by_less_than_a_half():
    rng = np.random.default_rng(1)
    y, hyper = (jnp.asarray(rng.normal(size=(1, 4, 4, width)), jnp.float32) for width in (8, 16))
    params = random_params(TINY, y, hyper)
    values = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
    after = TINY.apply({"params": params}, hyper, y, values, 3, method="refine")
    anchors = checkerboard((4, 4))
    np.testing.assert_array_equal(after[..., :4], y[..., :4])
    np.testing.assert_array_equal(after[0, anchors, 4:], y[0, anchors, 4:])
    moved = np.abs(after[0, ~anchors, 4:] - values[0, ~anchors])
    assert 1e-3 < moved.max() < 0.5


def test_offsets_move_where_keys_are_read():
    module = GlobalInterContext(4, head_dim=4, reference_stride=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6, 4)), jnp.float32)
    params = random_params(module, x)

    def weights(offset):
        bias = {"kernel": 0 * params["offset"]["kernel"], "bias": jnp.array(offset)}
        sown = module.apply({"params": {**params, "offset": bias}}, x, mutable="intermediates")[1]
        return np.asarray(sown["intermediates"]["attention_weights"][0])[0, 0]

    # With a stride of 2 the cells' centres lie between places; 2 tanh = 1/2 and -1/2 move every key onto one.
    half = math.atanh(0.25)
    dense = {name: (np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in ("query", "key")}
    query, key = (
        part.reshape(-1, 4) @ dense[name][0] + dense[name][1]
        for name, part in (("query", np.asarray(x)), ("key", np.asarray(x)[:, 1::2, 0::2]))
    )
    logits = query @ key.T / 2
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(weights([half, -half]), expected, atol=1e-5)
    assert np.abs(weights([0.0, 0.0]) - expected).max() > 1e-2


def test_rates_equal_those_of_compressai():
    """Golden arrays of `EntropyBottleneck` and `GaussianConditional`, see the docstring of the file."""
    with np.load(GOLDEN) as stored:
        golden = dict(stored)
    params = {
        name.removeprefix("prior/"): value
        for name, value in golden.items()
        if name.startswith("prior/") and name[-2] == "_"
    }
    found = FactorizedPrior().apply({"params": params}, jnp.asarray(golden["prior/x"]))
    np.testing.assert_allclose(2.0 ** -np.asarray(found), golden["prior/likelihood"], atol=1e-6)
    y, mean, scale = (jnp.asarray(golden[f"gaussian/{name}"]) for name in ("y", "mean", "scale"))
    found = gaussian_bits(y - mean, scale)
    # CompressAI cuts scales at 0.11 and probabilities at 1e-9 afterwards; none is so small here.
    np.testing.assert_allclose(2.0 ** -np.asarray(found), golden["gaussian/likelihood"], atol=1e-6)

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlayers
from jaxlayers.summary import summarize
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import swinface
from jaxlayers.window.swin import Swin
from jaxlayers.window.swinface import (
    ChannelGate,
    CosineClassifier,
    MultiLevelChannelAttention,
    SwinFace,
    cosface_logits,
    robust_square_loss,
)
from tests.window.axial_resnet_test import drawn, stimulus

GOLDEN = Path(__file__).parents[1] / "golden" / "swinface_parity.npz"
BACKBONE = Swin(num_classes=0, patch_size=2, embed_dim=4, depths=(1, 1), num_heads=(1, 2), window_size=4)
TINY = SwinFace(
    BACKBONE,
    groups=((("age", 1), ("young", 2)), (("smiling", 2),)),
    features=12,
    embedding_features=5,
    reduction=2,
)
KEY_BIAS = {r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"}

CASES = (
    Case(
        name="cosine_classifier",
        module=CosineClassifier(num_classes=4),
        inputs=lambda rng: (rng.normal(size=(3, 6)),),
        leading_axes=True,
        bad_inputs=(BadInput(match="num_classes=0 must be at least 1", module=CosineClassifier(0)),),
    ),
    Case(
        name="channel_gate",
        within="swinface",
        module=ChannelGate(reduction=2),
        inputs=lambda rng: (rng.normal(size=(2, 3, 5, 6)),),
        leading_axes=True,
        bad_inputs=(BadInput(match="reduction=0 must be at least 1", module=ChannelGate(0)),),
    ),
    Case(
        name="multi_level_channel_attention",
        within="swinface",
        module=MultiLevelChannelAttention(features=9, reduction=2),
        inputs=lambda rng: ([rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 4, 3, 4))],),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="must differ in their channels alone", inputs=lambda rng: ([],)),
            BadInput(
                match="must differ in their channels alone",
                inputs=lambda rng: ([np.ones((2, 4, 3, 2)), np.ones((2, 3, 4, 2))],),
            ),
            BadInput(match="features=1 must give each of the 2 levels", module=MultiLevelChannelAttention(1)),
        ),
    ),
    Case(
        name="swinface",
        module=TINY,
        inputs=lambda rng: (rng.normal(size=(2, 14, 16, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        bad_inputs=(
            BadInput(match="with different names", module=TINY.clone(groups=((("age", 1),), (("age", 2),)))),
            BadInput(match="none of them 'embedding'", module=TINY.clone(groups=((("embedding", 1),),))),
            BadInput(match="must have an output each", module=TINY.clone(groups=((("age", 1),), ()))),
            BadInput(match="must give an output", module=TINY.clone(groups=(), embedding_features=0)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
        ),
    ),
)


def test_published_model_has_the_published_codes_parameters_and_products():
    summary = summarize(jaxlayers.create_model("swinface"), *swinface.VARIANTS["swinface"]["inputs"])
    # Measured on the authors' code without the backbone's head, which nothing reads (393,728 parameters).
    assert summary.parameters == 67_809_266 - 393_728
    assert summary.macs == 6_089_402_432
    assert sum(len(group) for group in swinface.FACE_GROUPS) == 42


# Multi-level channel attention ----------------------------------------------------------------------------------------


def levels(rng, *widths):
    return [jnp.asarray(rng.normal(size=(2, 4, 4, width)), jnp.float32) for width in widths]


@functools.partial(jax.jit, static_argnums=0)
def run(module, variables, x):
    """Return the output and the gates."""
    output, sown = module.apply(variables, x, mutable=["intermediates"])
    return output, sown["intermediates"]["gate"]["gates"][0]


def drawn_like(variables, rng):
    """Draw parameters small enough for the gates to stay away from their ends."""
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.uniform(0.1, 1, size=leaf.shape), jnp.float32), variables)


def test_gates_lie_between_none_and_all_and_follow_the_picture(rng):
    module = MultiLevelChannelAttention(features=16, reduction=2)
    x = levels(rng, 4, 8)
    variables = module.init(jax.random.key(0), x)
    variables["params"]["gate"] = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), variables["params"]["gate"]
    )
    _, gates = run(module, variables, x)
    assert gates.shape == (2, 16)
    assert 0 < gates.min() < 0.5 < gates.max() < 1
    assert np.abs(gates[0] - gates[1]).max() > 0.01


def test_reordered_levels_reorder_the_gates(rng):
    module = MultiLevelChannelAttention(features=12, reduction=2)
    x = levels(rng, 4, 4, 4)
    variables = drawn_like(module.init(jax.random.key(0), x), rng)
    order, channels = [2, 0, 1], np.arange(12).reshape(3, 4)[[2, 0, 1]].reshape(-1)
    params, norm = variables["params"], variables["batch_stats"]["norm"]
    moved = {
        "params": {
            **{f"levels_{new}": params[f"levels_{old}"] for new, old in enumerate(order)},
            "gate": {
                "down": {**params["gate"]["down"], "kernel": params["gate"]["down"]["kernel"][channels]},
                "up": {
                    "kernel": params["gate"]["up"]["kernel"][:, channels],
                    "bias": params["gate"]["up"]["bias"][channels],
                },
            },
            "norm": jax.tree.map(lambda leaf: leaf[channels], params["norm"]),
        },
        "batch_stats": {"norm": jax.tree.map(lambda leaf: leaf[channels], norm)},
    }
    reordered = [x[index] for index in order]
    expected, gates = run(module, variables, x)
    found, found_gates = run(module, moved, reordered)
    np.testing.assert_allclose(found_gates, gates[:, channels], atol=1e-6)
    np.testing.assert_allclose(found, expected[:, channels], atol=1e-5)
    # The levels alone, without their parameters, are not interchangeable.
    assert np.abs(run(module, variables, reordered)[1] - gates[:, channels]).max() > 1e-4


def test_features_are_shared_out_as_the_channels_are():
    assert swinface._shares(512, [192, 384, 768, 768]) == [47, 93, 186, 186]
    assert swinface._shares(7, [1, 1, 1]) == [3, 2, 2]


def test_levels_are_averaged_over_what_there_is(rng):
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    found = swinface._average(jnp.asarray(x), (2, 2))
    assert found.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(found[:, 0, 1], x[:, :2, 2:].mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(found[:, 2, 0], x[:, 4:, :2].mean((1, 2)), atol=1e-6)


def test_every_stage_reaches_every_group(rng):
    """What a group reads of a level is cut off by zeroing its convolution, and its outputs change; others do not."""
    x = jnp.asarray(rng.normal(size=(1, 16, 16, 3)), jnp.float32)
    apply = jax.jit(TINY.apply)
    variables = drawn_like(jax.jit(TINY.init)(jax.random.key(0), x), rng)
    expected = apply(variables, x)
    for level in range(2):
        cut = jax.tree.map(lambda leaf: leaf, variables)
        kernel = cut["params"]["attentions_1"][f"levels_{level}"]
        kernel["kernel"] = jnp.zeros_like(kernel["kernel"])
        found = apply(cut, x)
        assert np.abs(found["smiling"] - expected["smiling"]).max() > 1e-3
        for name in ("age", "young", "embedding"):
            np.testing.assert_array_equal(found[name], expected[name])


# Losses ---------------------------------------------------------------------------------------------------------------


def test_margin_lowers_the_labels_cosine_alone(rng):
    cosines = jnp.asarray(rng.uniform(-1, 1, size=(4, 5)), jnp.float32)
    labels = jnp.asarray([0, 4, 2, -1])
    plain = cosface_logits(cosines, labels, margin=0.0, scale=10.0)
    np.testing.assert_allclose(plain, 10 * cosines, rtol=1e-6)
    lowered = plain - cosface_logits(cosines, labels, margin=0.3, scale=10.0)
    np.testing.assert_allclose(lowered, 3 * jax.nn.one_hot(labels, 5), atol=1e-5)
    with pytest.raises(ValueError, match="margin=2"):
        cosface_logits(cosines, labels, margin=2.0)
    with pytest.raises(ValueError, match=r"scale=0.0 be positive"):
        cosface_logits(cosines, labels, scale=0.0)


def test_cosines_depend_on_directions_alone(rng):
    module = CosineClassifier(3)
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    variables = module.init(jax.random.key(0), x)
    cosines = module.apply(variables, x)
    assert np.abs(cosines).max() <= 1
    longer = jax.tree.map(lambda leaf: 7 * leaf, variables)
    np.testing.assert_allclose(module.apply(longer, 0.01 * x), cosines, atol=1e-5)
    np.testing.assert_array_equal(module.apply(variables, jnp.zeros((1, 6))), np.zeros((1, 3)))
    gradient = jax.grad(lambda x: module.apply(variables, x).sum())(jnp.zeros((1, 6)))
    assert np.isfinite(gradient).all()


def test_square_loss_goes_from_squares_to_a_bounded_one():
    error = jnp.asarray([0.0, 1.0, 100.0])
    np.testing.assert_allclose(robust_square_loss(error, jnp.zeros(3), progress=0.0), error**2 / 2)
    bounded = robust_square_loss(error, jnp.zeros(3), progress=1.0, sigma=2.0)
    np.testing.assert_allclose(bounded, [0, 1 - np.exp(-1 / 8), 1], rtol=1e-5)
    with pytest.raises(ValueError, match="sigma=0"):
        robust_square_loss(error, error, progress=0.5, sigma=0.0)


# Beside the authors' code ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "lxq1000/SwinFace" in str(stored["provenance"])
        return dict(stored)


def test_network_equals_the_authors_code(golden):
    """A backbone of depths 1-2-1-1 and two groups; `levels` and descriptions are what the outputs are made of."""
    model = SwinFace(
        Swin(num_classes=0, patch_size=2, depths=(1, 2, 1, 1), window_size=4),
        groups=((("first", 2),), (("second", 1), ("third", 2))),
        embedding_features=16,
    )
    variables = swinface.from_reference(drawn(golden["names"]), model)
    x = stimulus(2, 3, 64, 64)

    @jax.jit
    def run(variables, x):
        outputs, sown = model.apply(variables, x, mutable=["intermediates"], capture_intermediates=True)
        return outputs, [sown["intermediates"][f"attentions_{index}"]["__call__"][0] for index in range(2)]

    outputs, descriptions = run(variables, x)
    expected = {
        "embedding": golden["embedding"],
        **{name: golden[f"output_{index}"] for index, name in enumerate(("first", "second", "third"))},
    }
    for name, value in expected.items():
        print(name, np.abs(outputs[name] - value).max())
        np.testing.assert_allclose(outputs[name], value, atol=1e-5, err_msg=name)
        assert np.std(value) > 0.03
    np.testing.assert_allclose(descriptions, golden["descriptions"], atol=1e-5)


def test_losses_equal_the_authors_code(golden):
    cosines, labels = jnp.asarray(golden["cosines"]), jnp.asarray(golden["labels"])
    np.testing.assert_allclose(cosface_logits(cosines, labels), golden["cosface"], rtol=1e-6)
    errors = jnp.linspace(-9.0, 9.0, 7)
    for progress, expected in zip((0.0, 0.4, 1.0), golden["age"], strict=True):
        np.testing.assert_allclose(
            robust_square_loss(errors, jnp.zeros(7), progress=progress), expected, rtol=1e-5, atol=1e-6
        )


def test_reference_checkpoints_that_do_not_fit_are_refused(golden):
    model = SwinFace(Swin(num_classes=0, patch_size=2, depths=(1, 2, 1, 1), window_size=4), groups=())
    with pytest.raises(ValueError, match=r"unknown \['fam"):
        swinface.from_reference(drawn(golden["names"]), model)

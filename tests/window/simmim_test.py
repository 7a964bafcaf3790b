import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.testing import BadInput, Case
from jaxlayers.window import SimMIM, Swin, SwinV2, simmim, swin

ENCODER = Swin(
    num_classes=0, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=3, drop_path_rate=0.0
)


def inputs(rng):
    # Sizes that fit neither the patch nor the last map's stride.
    return rng.normal(size=(2, 10, 9, 3)), rng.random((2, 5, 5)) < 0.5


CASES = (
    Case(
        name="simmim",
        module=SimMIM(ENCODER),
        inputs=inputs,
        leading_axes=True,
        zero_gradients={"key/bias$": "it adds one number to all logits of a query, which the softmax takes out"},
        bad_inputs=(
            BadInput(match="encoder.num_classes=3 must be 0", module=SimMIM(ENCODER.clone(num_classes=3))),
            BadInput(
                match=r"masked must be a boolean for each patch, of shape \(2, 5, 5\); it is bool of shape \(2, 4, 5\)",
                inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)), np.ones((2, 4, 5), bool)),
            ),
            BadInput(
                match="it is int32 of shape",
                inputs=lambda rng: (rng.normal(size=(2, 10, 9, 3)), np.ones((2, 5, 5), np.int32)),
            ),
        ),
    ),
)


@pytest.fixture(scope="module")
def tiny():
    """A model with random parameters, images of whole strides, masks of half of the units."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 24, 3)), jnp.float32)
    masked = simmim.random_mask(jax.random.key(3), (2,), (16, 24), patch_size=2, mask_patch_size=8, mask_ratio=0.5)
    model = SimMIM(ENCODER)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, masked)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape) + ("scale" in str(path[-1])), jnp.float32),
        shapes,
    )
    return model, params, x, masked


def pixels(masked, patch=2):
    return np.repeat(np.repeat(np.asarray(masked), patch, -2), patch, -1)


# The claim -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Swin, SwinV2])
def test_hidden_pixels_have_no_influence_on_the_output(tiny, kind):
    model, params, x, masked = tiny
    if kind is SwinV2:
        model = SimMIM(SwinV2(num_classes=0, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=3))
        params = jax.jit(model.init)(jax.random.key(0), x, masked)["params"]
    apply = jax.jit(lambda x: model.apply({"params": params}, x, masked))
    out = np.asarray(apply(x))
    hidden = pixels(masked)[..., None]
    other = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    np.testing.assert_array_equal(apply(jnp.where(hidden, other, x)), out)
    # Negative control: a pixel that is seen, and the same pixels without a mask, do count.
    assert np.any(apply(jnp.where(hidden, x, other)) != out)
    seeing = jax.jit(lambda x: model.apply({"params": params}, x))
    assert np.any(seeing(jnp.where(hidden, other, x)) != seeing(x))


def test_loss_has_exactly_no_gradient_to_visible_targets(tiny):
    model, params, x, masked = tiny
    out = model.apply({"params": params}, x, masked)
    hidden = np.broadcast_to(pixels(masked)[..., None], x.shape)

    def gradient(loss):
        return np.asarray(jax.grad(lambda target: loss(target).sum())(x))

    found = gradient(lambda target: simmim.masked_l1(target, out, masked, patch_size=2))
    assert np.all(found[~hidden] == 0)
    assert np.all(found[hidden] != 0)
    # Negative control: the error over all pixels has one everywhere.
    assert np.all(gradient(lambda target: jnp.abs(target - out))[~hidden] != 0)


def test_where_nothing_is_hidden_the_token_has_no_influence(tiny):
    model, params, x, masked = tiny
    none = jnp.zeros_like(masked)
    apply = jax.jit(lambda token, masked: model.apply({"params": {**params, "mask_token": token}}, x, masked))
    plain = model.apply({"params": params}, x)
    np.testing.assert_allclose(apply(params["mask_token"], none), plain, atol=1e-5)
    np.testing.assert_array_equal(apply(params["mask_token"] + 1, none), apply(params["mask_token"], none))
    assert np.any(apply(params["mask_token"] + 1, masked) != apply(params["mask_token"], masked))


# Its parts -------------------------------------------------------------------------------------------------------


def test_output_is_the_encoders_last_map_laid_out_pixel_by_pixel(tiny):
    model, params, x, _ = tiny
    last = nn.apply(Swin.features, ENCODER)({"params": params["encoder"]}, x)[-1]
    assert last.stride == (4, 4)
    y = np.asarray(nn.LayerNorm(epsilon=1e-5).apply({"params": params["encoder"]["final_norm"]}, last.array))
    columns = y @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    expected = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        image, row, column, channel = place
        index = ((row % 4) * 4 + column % 4) * 3 + channel
        expected[place] = columns[image, row // 4, column // 4, index]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-4)


def test_images_that_are_not_multiples_of_the_stride_are_cropped(tiny):
    model, params, x, masked = tiny
    out = model.apply({"params": params}, x[:, :13, :18], masked[:, :7, :9])
    assert out.shape == (2, 13, 18, 3)


def test_encoder_parameters_are_those_of_a_classifier_without_its_head(tiny):
    _, params, x, _ = tiny
    classifier = ENCODER.clone(num_classes=5)
    wanted = jax.eval_shape(classifier.init, jax.random.key(0), x)["params"]
    fitted = swin.reset_classifier(params["encoder"], jax.random.key(1), 5)
    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, wanted)
    assert classifier.apply({"params": fitted}, x).shape == (2, 5)


@pytest.mark.parametrize(("ratio", "count"), [(0.6, 4), (0.5, 3), (0.01, 1), (1.0, 6)])
def test_masks_hide_the_share_asked_for_in_whole_units(ratio, count):
    arguments = {"patch_size": 4, "mask_patch_size": 8, "mask_ratio": ratio}
    masked = np.asarray(simmim.random_mask(jax.random.key(0), (3, 50), (16, 24), **arguments))
    assert masked.shape == (3, 50, 4, 6)
    units = masked.reshape(3, 50, 2, 2, 3, 2)
    assert np.all(units == units[..., :1, :, :1])
    assert np.all(masked.sum((-2, -1)) == 4 * count)
    # Each image its own, each key its own, each unit as often as any other.
    share = masked.mean((0, 1))
    np.testing.assert_allclose(share, count / 6, atol=0.13)
    other = np.asarray(simmim.random_mask(jax.random.key(1), (3, 50), (16, 24), **arguments))
    assert (np.any(masked != other) and np.any(masked[0] != masked[1])) == (ratio < 1)


def test_a_ratio_of_whole_units_is_not_rounded_up():
    assert math.ceil(0.28 * 25) == 8  # 7.000000000000001 in binary
    masked = simmim.random_mask(jax.random.key(0), (1,), (5, 5), patch_size=1, mask_patch_size=1, mask_ratio=0.28)
    assert masked.sum() == 7


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ((192, 192), {"mask_patch_size": 30}, "mask_patch_size=30 must be a multiple of patch_size=4"),
        ((192, 200), {}, r"size=\(192, 200\) must be multiples of mask_patch_size=32"),
        ((192, 192), {"mask_ratio": 0.0}, r"mask_ratio=0.0 must lie in \(0, 1\]"),
    ],
)
def test_masks_that_cannot_be_are_refused(size, arguments, message):
    with pytest.raises(ValueError, match=message):
        simmim.random_mask(jax.random.key(0), (1,), size, **arguments)


def test_loss_equals_a_loop_over_hidden_pixels_and_the_references_sum(rng):
    x, y = rng.normal(size=(2, 3, 7, 9, 2)).astype(np.float32)
    masked = simmim.random_mask(jax.random.key(0), (3,), (8, 9), patch_size=1, mask_patch_size=1, mask_ratio=0.4)
    masked = masked[:, ::2, ::3]  # patches of 2 x 3 over 7 x 9 pixels: the last row is cut
    found = simmim.masked_l1(jnp.asarray(x), jnp.asarray(y), masked, patch_size=(2, 3))
    for image in range(3):
        errors = [
            abs(float(x[image, row, column, channel]) - float(y[image, row, column, channel]))
            for row, column, channel in np.ndindex(7, 9, 2)
            if masked[image, row // 2, column // 3]
        ]
        assert found[image] == pytest.approx(np.mean(errors), rel=1e-5)
    # With equally many hidden in each image, the mean is the reference's quotient over the batch.
    equal = simmim.random_mask(jax.random.key(0), (3,), (7, 9), patch_size=1, mask_patch_size=1)
    weight = np.asarray(equal)[..., None]
    reference = (np.abs(x - y) * weight).sum() / weight.sum() / 2
    assert simmim.masked_l1(jnp.asarray(x), jnp.asarray(y), equal, patch_size=1).mean() == pytest.approx(reference)


def test_visible_pixels_do_not_count_whatever_they_hold():
    x = jnp.asarray([[[[1.0], [jnp.nan]]]])
    masked = jnp.asarray([[[True, False]]])
    assert simmim.masked_l1(x, jnp.zeros_like(x), masked, patch_size=1).tolist() == [1.0]
    assert simmim.masked_l1(x, jnp.zeros_like(x), ~masked & masked, patch_size=1).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"masked of shape \(1, 1, 2\) must have a patch_size=\(2, 2\) for each of"):
        simmim.masked_l1(x, x, masked, patch_size=2)


# Reference checkpoints -------------------------------------------------------------------------------------------


def to_reference(params, source):
    """Write our parameters the way a reference stores them."""
    prefix = "encoder." if source == "official" else ""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params["encoder"], sep="/").items():
        leaf = np.asarray(leaf)
        if path == "patch_embed/projection/kernel":
            leaf = leaf.reshape(2, 2, -1, leaf.shape[-1]).transpose(3, 2, 0, 1)
        elif path.endswith("kernel"):
            leaf = leaf.T
        tensors.setdefault(prefix + swin.reference_name(path, source), {})[path.split("/")[-2]] = leaf
    tensors = {
        name: np.concatenate([parts[one] for one in ("query", "key", "value") if one in parts] or list(parts.values()))
        for name, parts in tensors.items()
    }
    kernel, bias = (np.asarray(params["decoder"][name]) for name in ("kernel", "bias"))
    token = "encoder.mask_token" if source == "official" else "swin.embeddings.mask_token"
    return {
        **tensors,
        token: np.asarray(params["mask_token"])[None, None],
        "decoder.0.weight": kernel.T.reshape(4, 4, 3, -1).transpose(2, 0, 1, 3).reshape(48, -1, 1, 1),
        "decoder.0.bias": bias.reshape(4, 4, 3).transpose(2, 0, 1).reshape(-1),
    }


@pytest.mark.parametrize("source", ["official", "huggingface", "huggingface_5"])
def test_reference_names_cover_every_parameter(tiny, source):
    model, params, _, _ = tiny
    found = simmim.from_reference(to_reference(params, source), model, source=source)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    model, params, _, _ = tiny
    tensors = to_reference(params, "official")
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        simmim.from_reference(tensors, model, source="timm")
    with pytest.raises(ValueError, match="must hold .'swin.embeddings.mask_token'.; pass the source it comes from"):
        simmim.from_reference(tensors, model, source="huggingface")
    with pytest.raises(ValueError, match=r"decoder.0.weight of shape \(48, 16, 1, 1\) must have pixels of \(20, 20\)"):
        simmim.from_reference(tensors, SimMIM(ENCODER.clone(patch_size=10)), source="official")

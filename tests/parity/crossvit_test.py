"""CrossViT beside timm, on the same random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import reference_name
from jaxlayers.window import CrossViT, crossvit
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


def randomise(model):
    """Draw every parameter at a scale at which it shows: fresh ones leave attention nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif parameter.ndim == 3:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval().double()


def state(model):
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def images(*size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


def to_torch(x):
    """Return channels first, in float64: torch's bicubic resampling in float32 is off by 1e-4 of its own in float64."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).double()


def assert_close(found, expected, what=""):
    expected = expected.detach().numpy()
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def build(name, **changes):
    variant = crossvit.VARIANTS[name]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    return CrossViT(**{**fields, **changes})


def run(model, params, x):
    def both(variables, x):
        return model.apply(variables, x), nn.apply(CrossViT.tokens, model)(variables, x)

    return jax.jit(both)({"params": params}, jnp.asarray(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["crossvit_15_240", "crossvit_9_dagger_240"])
def test_named_models_equal_timm(timm, name):
    reference = randomise(timm.create_model(name, pretrained=False))
    model = build(name)
    x = images(240, 240, batch=1)
    logits, tokens = run(model, crossvit.from_reference(state(reference), model, source="timm"), x)
    assert_close(logits, reference(to_torch(x)), "logits")
    expected = reference.forward_intermediates(to_torch(x), output_fmt="NLC", intermediates_only=True)
    for branch, found in enumerate(tokens):
        assert_close(found[:, 1:], expected[(branch + 1) * model.num_encoders - 1], f"branch {branch}")


SMALL = {"embed_dim": (16, 32), "num_heads": (2, 4), "num_classes": 7, "image_scale": (1.0, 0.8)}


@pytest.fixture
def small(timm):
    """A small reference of 60 pixels, of which the large patches see 48, and our model of it."""
    reference = timm.models.crossvit.CrossVit(
        img_size=60,
        img_scale=(1.0, 0.8),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 4),
        mlp_ratio=(3, 3, 1),
        num_classes=7,
    )
    return randomise(reference), CrossViT(image_size=60, depths=(1, 2), num_encoders=2, **SMALL)


@torch.no_grad()
def test_images_of_another_size_equal_timm(small):
    reference, model = small
    params = crossvit.from_reference(state(reference), model, source="timm")
    for size in [(60, 60), (53, 80)]:
        logits, _ = run(model, params, images(*size))
        assert_close(logits, reference(to_torch(images(*size))))
    kept = {name: value for name, value in params.items() if not name.endswith("_head")}
    both, _ = run(model.clone(num_classes=0), kept, images(60, 60))
    reference.reset_classifier(0)
    assert_close(both, reference(to_torch(images(60, 60))))


@torch.no_grad()
def test_a_resized_model_equals_one_resized_by_timm(timm, small):
    from timm.layers import resample_abs_pos_embed

    reference, model = small
    larger = timm.models.crossvit.CrossVit(
        img_size=120,
        img_scale=(1.0, 0.8),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(2, 4),
        mlp_ratio=(3, 3, 1),
        num_classes=7,
    )
    larger.eval().double()
    tensors = dict(reference.state_dict())
    for branch, side in enumerate((10, 6)):
        name = f"pos_embed_{branch}"
        tensors[name] = resample_abs_pos_embed(tensors[name], new_size=[side, side], num_prefix_tokens=1)
    larger.load_state_dict(tensors)
    params = crossvit.from_reference(state(reference), model, source="timm")
    target = model.clone(image_size=120)
    logits, _ = run(target, crossvit.resize(params, model, target), images(120, 120))
    assert_close(logits, larger(to_torch(images(120, 120))))


def test_224_pixels_work_where_timm_fails(timm):
    with torch.no_grad(), pytest.raises(RuntimeError, match="325"):
        timm.create_model("crossvit_9_240", img_size=224)(torch.zeros(1, 3, 224, 224))
    model = build("crossvit_9_240", image_size=224)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.eval_shape(model.apply, variables, x).shape == (1, 1000)


def test_official_names_are_those_that_timm_converts(small):
    reference, model = small
    tensors = reference.state_dict()
    params = crossvit.from_reference(state(reference), model, source="timm")
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    names = [
        {reference_name(path, crossvit.REFERENCE_NAMES[source]) for path in paths} for source in ("official", "timm")
    ]
    assert "pos_embed.0" in names[0]
    # timm's own conversion of the official files, in its `pretrained_filter_fn`.
    converted = {name.replace(".", "_") if "pos_embed" in name or "cls_token" in name else name for name in names[0]}
    assert converted == names[1]
    assert {name for name in names[1] if ".attn." not in name} <= set(tensors)


def test_weights_go_back_to_timm(timm, small):
    reference, model = small
    check_file(state(reference), model, "timm")
    dagger = timm.models.crossvit.CrossVit(
        img_size=60,
        img_scale=(1.0, 0.8),
        patch_size=(12, 16),
        embed_dim=(16, 32),
        depth=((1, 2, 0),),
        num_heads=(2, 4),
        num_classes=7,
        mlp_ratio=(3, 3, 1),
        multi_conv=True,
    )
    check_file(state(dagger), model.clone(num_encoders=1, conv_embed=True), "timm")
    with torch.device("meta"):
        named = timm.create_model("crossvit_9_dagger_240")
    assert guessed(named.state_dict()) == [("crossvit_9_dagger_240", "timm")]

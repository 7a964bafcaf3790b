"""TNT beside timm, on the same random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import reference_name
from jaxlayers.window import TNT, tnt
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


def randomise(model):
    """Draw every parameter at a scale at which it shows: fresh ones leave attention nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "pos" in name or "token" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def images(*size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def assert_close(found, expected, what=""):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def run(model, params, x):
    def both(variables, x):
        return model.apply(variables, x), nn.apply(TNT.features, model)(variables, x)[0].array

    return jax.jit(both)({"params": params}, jnp.asarray(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "theirs"), [("tnt_small", "tnt_s_patch16_224"), ("tnt_small_legacy", "tnt_s_legacy_patch16_224")]
)
def test_named_models_equal_timm(timm, name, theirs):
    reference = randomise(timm.create_model(theirs, pretrained=False))
    model = TNT(**{key: value for key, value in tnt.VARIANTS[name].items() if key not in ("module", "inputs")})
    x = images(224, 224, batch=1)
    logits, grid = run(model, tnt.from_reference(state(reference), model, source="timm"), x)
    assert_close(logits, reference(to_torch(x)), "logits")
    last = reference.forward_intermediates(to_torch(x), indices=1, intermediates_only=True)[0]
    assert_close(grid, last.permute(0, 2, 3, 1), "patches")


SHAPE = {"embed_dim": (8, 24), "depth": 2, "num_heads": (2, 3), "num_classes": 7}


def small_reference(timm, size, *, legacy):
    return timm.models.tnt.TNT(
        img_size=size,
        embed_dim=24,
        inner_dim=8,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=3,
        num_classes=7,
        legacy=legacy,
    )


@torch.no_grad()
@pytest.mark.parametrize("legacy", [False, True])
def test_a_resized_model_equals_one_resized_by_timm(timm, legacy):
    from timm.layers import resample_abs_pos_embed

    reference = randomise(small_reference(timm, (48, 32), legacy=legacy))
    model = TNT(image_size=(48, 32), legacy=legacy, **SHAPE)
    params = tnt.from_reference(state(reference), model, source="timm")
    logits, _ = run(model, params, images(48, 32))
    assert_close(logits, reference(to_torch(images(48, 32))))
    larger = small_reference(timm, (64, 80), legacy=legacy).eval()
    tensors = dict(reference.state_dict())
    tensors["patch_pos"] = resample_abs_pos_embed(
        tensors["patch_pos"], new_size=[4, 5], old_size=[3, 2], num_prefix_tokens=1
    )
    larger.load_state_dict(tensors)
    target = model.clone(image_size=(64, 80))
    logits, _ = run(target, tnt.resize(params, model, target), images(64, 80))
    assert_close(logits, larger(to_torch(images(64, 80))))


def test_official_names_are_those_that_timm_converts(timm):
    reference = small_reference(timm, 32, legacy=False)
    model = TNT(image_size=32, **SHAPE)
    tensors = reference.state_dict()
    params = tnt.from_reference(state(reference), model, source="timm")
    # Our names say `query` and `key` where the files hold both in one.
    paths = [path for path in flax.traverse_util.flatten_dict(params, sep="/") if "/key/" not in path]
    names = {
        source: [reference_name(path, tnt.REFERENCE_NAMES[source]).replace(".query.", ".qk.") for path in paths]
        for source in ("official", "timm")
    }
    official = {ours: tensors[theirs] for ours, theirs in zip(names["official"], names["timm"], strict=True)}
    official["inner_pos"] = official["inner_pos"].flatten(2).transpose(1, 2)
    assert "blocks.0.outer_attn.qk.weight" in official
    read = tnt.from_reference({name: one.numpy() for name, one in official.items()}, model, source="official")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    converted = timm.models.tnt.checkpoint_filter_fn(official, reference)
    assert set(converted) == set(tensors)
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_weights_go_back_to_timm(timm):
    for legacy in (False, True):
        reference = small_reference(timm, (48, 32), legacy=legacy)
        check_file(state(reference), TNT(image_size=(48, 32), legacy=legacy, **SHAPE), "timm")
    with torch.device("meta"):
        named = timm.create_model("tnt_s_legacy_patch16_224")
    assert guessed(named.state_dict()) == [("tnt_small_legacy", "timm")]

"""Hiera beside timm and Hugging Face transformers, on the same random weights; TurboViT beside timm's blocks."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import reference_name
from jaxlayers.window import hiera
from jaxlayers.window.hiera import Hiera
from jaxlayers.window.turbovit import TurboViT
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
            elif "pos" in name:
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
    assert found.shape == expected.shape
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def run(model, params, x):
    """Return logits, and by name the outputs of embedding, blocks and stages."""
    kinds = ("HieraEmbed", "HieraBlock", "HieraStage")

    def apply(variables, x):
        return model.apply(variables, x, capture_intermediates=lambda module, _: type(module).__name__ in kinds)

    logits, state = jax.jit(apply)({"params": params}, jnp.asarray(x))
    flat = flax.traverse_util.flatten_dict(state["intermediates"], sep="/")
    outputs = {path.removesuffix("/__call__"): value[0] for path, value in flat.items() if path.endswith("/__call__")}
    return logits, outputs


def compare(reference, model, x):
    """Compare logits and the outputs of embedding and blocks with a model of timm's, whose weights it has."""
    params = hiera.from_reference(state(reference), model, source="timm")
    logits, outputs = run(model, params, x)
    assert_close(logits, reference(to_torch(x)), "logits")
    embedded = reference._pos_embed(reference.patch_embed(to_torch(x)))
    assert_close(outputs["patch_embed"], embedded.reshape(outputs["patch_embed"].shape), "embedding")
    expected = reference.forward_intermediates(to_torch(x), intermediates_only=True, coarse=False, output_fmt="NHWC")
    blocks = [f"stages_{stage}/blocks_{block}" for stage, depth in enumerate(model.depths) for block in range(depth)]
    assert len(blocks) == len(expected)
    for name, other in zip(blocks, expected, strict=True):
        assert_close(outputs[name], other, name)
    return params


@torch.no_grad()
def test_tiny_equals_timm(timm):
    reference = randomise(timm.create_model("hiera_tiny_224", pretrained=False))
    fields = {key: value for key, value in hiera.VARIANTS["hiera_tiny"].items() if key not in ("module", "inputs")}
    compare(reference, Hiera(**fields), images(224, 224, batch=1))


SMALL = Hiera(image_size=(64, 96), embed_dim=8, depths=(1, 2, 2, 1), num_heads=2, num_classes=7)


def small_reference(timm, **changes):
    fields = {"img_size": (64, 96), "embed_dim": 8, "stages": (1, 2, 2, 1), "num_heads": 2, "num_classes": 7}
    return timm.models.hiera.Hiera(**{**fields, **changes})


@pytest.fixture(scope="module")
def pair(timm):
    reference = randomise(small_reference(timm))
    return reference, hiera.from_reference(state(reference), SMALL, source="timm")


@torch.no_grad()
def test_every_block_of_an_oblong_model_equals_timm(pair):
    reference, params = pair
    x = images(64, 96)
    compare(reference, SMALL, x)
    levels = jax.jit(lambda x: nn.apply(Hiera.features, SMALL)({"params": params}, x))(x)
    expected = reference.forward_intermediates(to_torch(x), intermediates_only=True, output_fmt="NHWC")
    for index, (level, other) in enumerate(zip(levels, expected, strict=True)):
        assert_close(level.array, other, f"map {index}")


@torch.no_grad()
def test_kept_mask_units_equal_timm(pair):
    reference, params = pair
    x = images(64, 96)
    kept = jnp.array([[0, 2, 5], [1, 3, 4]])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[torch.arange(2)[:, None], torch.from_numpy(np.asarray(kept).copy())] = True

    @jax.jit
    def both(x):
        return SMALL.apply({"params": params}, x, kept), nn.apply(Hiera.units, SMALL)({"params": params}, x, kept)

    logits, found = both(x)
    features, expected = reference.forward_features(to_torch(x), mask=mask, return_intermediates=True)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(one, other, f"units {index}")
    assert_close(logits, reference.forward_head(features), "logits")


@torch.no_grad()
@pytest.mark.parametrize("local_stages", [0, 3])
def test_other_numbers_of_local_stages_equal_timm(timm, local_stages):
    shape = {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": 1}
    local = tuple(stage < local_stages for stage in range(3))
    # Three stages pool twice: timm's units are then 4 x 4 in its order of tokens.
    reference = small_reference(
        timm, embed_dim=8, stages=(1, 1, 1), num_heads=1, q_pool=2, mask_unit_attn=local, mask_unit_size=(4, 4)
    )
    compare(randomise(reference), SMALL.clone(local_stages=local_stages, mask_unit_size=4, **shape), images(64, 96))


@torch.no_grad()
def test_videos_equal_timm(timm):
    shape = {"patch_stride": (2, 4, 4), "mask_unit_size": (1, 8, 8)}
    reference = randomise(
        small_reference(
            timm,
            img_size=(6, 64, 32),
            patch_kernel=(3, 7, 7),
            patch_padding=(1, 3, 3),
            q_stride=(1, 2, 2),
            sep_pos_embed=True,
            **shape,
        )
    )
    model = SMALL.clone(image_size=(6, 64, 32), patch_size=(3, 7, 7), **shape)
    params = hiera.from_reference(state(reference), model, source="timm")
    x = images(6, 64, 32)
    logits, outputs = run(model, params, x)
    features, expected = reference.forward_features(to_torch(x), return_intermediates=True)
    assert_close(logits, reference.forward_head(features), "logits")
    for index, other in enumerate(expected):
        assert_close(outputs[f"stages_{index}"], other, f"map {index}")


@torch.no_grad()
def test_small_model_equals_transformers(transformers):
    config = transformers.HieraConfig(
        image_size=[64, 96], embed_dim=8, depths=[1, 2, 2, 1], num_heads=[2, 4, 8, 16], num_labels=7
    )
    reference = randomise(transformers.HieraForImageClassification(config))
    params = hiera.from_reference(state(reference), SMALL, source="huggingface")
    x = images(64, 96)
    logits, outputs = run(SMALL, params, x)
    out = reference(to_torch(x), output_hidden_states=True)
    assert_close(logits, out.logits, "logits")
    for index, other in enumerate(out.reshaped_hidden_states[1:]):
        assert_close(outputs[f"stages_{index}"], other, f"map {index}")


@torch.no_grad()
def test_a_resized_model_equals_one_resized_by_timm(timm, pair):
    from timm.layers import resample_abs_pos_embed

    reference, params = pair
    larger = small_reference(timm, img_size=(96, 32)).eval()
    tensors = dict(reference.state_dict())
    tensors["pos_embed"] = resample_abs_pos_embed(
        tensors["pos_embed"], new_size=[24, 8], old_size=[16, 24], num_prefix_tokens=0
    )
    larger.load_state_dict(tensors)
    target = SMALL.clone(image_size=(96, 32))
    logits, _ = run(target, hiera.resize(params, SMALL, target), images(96, 32))
    assert_close(logits, larger(to_torch(images(96, 32))))


def test_official_names_are_those_that_timm_converts(timm, pair):
    reference, params = pair
    tensors = reference.state_dict()
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    starts = np.cumsum([0, *SMALL.depths])

    def file_name(path, source):
        # Our names give blocks a stage and cut `qkv` in three.
        name = reference_name(path, hiera.REFERENCE_NAMES[source])
        for part in ("query", "key", "value"):
            name = name.replace(f".attn.{part}.", ".attn.qkv.")
        if name.startswith("blocks."):
            _, stage, block, rest = name.split(".", 3)
            name = f"blocks.{starts[int(stage)] + int(block)}.{rest}"
        return name

    official = {file_name(path, "official"): tensors[file_name(path, "timm")] for path in paths}
    assert {"head.projection.weight", "norm.bias"} <= set(official)
    converted = timm.models.hiera.checkpoint_filter_fn(dict(official), reference)
    assert set(converted) == set(tensors)
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)
    read = hiera.from_reference({name: one.numpy() for name, one in official.items()}, SMALL, source="official")
    jax.tree.map(np.testing.assert_array_equal, read, params)


@torch.no_grad()
def test_turbovit_equals_timms_blocks(timm):
    # Hiera's parts, with a wider stem and a first block that only narrows.
    reference = small_reference(timm, stages=(2, 1, 2, 1))
    reference.patch_embed = timm.models.hiera.PatchEmbed(3, 12, (7, 7), (4, 4), (3, 3))
    reference.pos_embed = torch.nn.Parameter(torch.zeros(1, 16 * 24, 12))
    reference.blocks[0] = timm.models.hiera.HieraBlock(
        12, 8, 2, q_stride=1, window_size=64, use_mask_unit_attn=True, norm_layer=timm.layers.LayerNorm
    )
    model = TurboViT(
        num_classes=7,
        image_size=(64, 96),
        stem_features=12,
        embed_dim=(8, 16, 32, 64),
        depths=(2, 1, 2, 1),
        num_heads=(2, 4, 8, 16),
    )
    compare(randomise(reference), model, images(64, 96))


def test_weights_go_back_to_their_references(timm, transformers, pair):
    check_file(state(pair[0]), SMALL, "timm")
    shape = {"patch_stride": (2, 4, 4), "mask_unit_size": (1, 8, 8)}
    reference = small_reference(
        timm,
        img_size=(6, 64, 32),
        patch_kernel=(3, 7, 7),
        patch_padding=(1, 3, 3),
        q_stride=(1, 2, 2),
        sep_pos_embed=True,
        **shape,
    )
    check_file(state(reference), SMALL.clone(image_size=(6, 64, 32), patch_size=(3, 7, 7), **shape), "timm")
    config = transformers.HieraConfig(
        image_size=[64, 96], embed_dim=8, depths=[1, 2, 2, 1], num_heads=[2, 4, 8, 16], num_labels=7
    )
    check_file(state(transformers.HieraForImageClassification(config)), SMALL, "huggingface")
    with torch.device("meta"):
        named = timm.create_model("hiera_tiny_224", num_classes=10)
    assert guessed(named.state_dict()) == [("hiera_tiny", "timm")]

"""Swin V2 beside timm, Hugging Face transformers and torchvision, on the same random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlayers
from jaxlayers.core.reference import reference_name
from jaxlayers.window import SwinV2, swin_v2
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


def randomise(model):
    """Draw every parameter at a scale at which it shows: fresh branches add nothing, fresh biases are flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(0.5 + 0.2 * noise)
            elif parameter.ndim == 1 or "logit_scale" in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def images(*size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def run(model, params, x):
    """Return logits and the maps of all stages, as NumPy."""

    def both(variables, x):
        return model.apply(variables, x), nn.apply(SwinV2.features, model)(variables, x)

    logits, levels = jax.jit(both)({"params": params}, jnp.asarray(x))
    return np.asarray(logits), [np.asarray(level.array) for level in levels]


def assert_close(found, expected, what="", tolerance=1e-4):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def timm_maps(model, x):
    return [one.permute(0, 2, 3, 1) for one in model.forward_intermediates(to_torch(x), intermediates_only=True)]


def huggingface_maps(model, x):
    """Return the maps of all stages before their merging, channels last."""
    tokens, size = model.swinv2.embeddings(to_torch(x))
    out = model.swinv2.encoder(tokens, size, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    return [one.permute(0, 2, 3, 1) for one in out.reshaped_hidden_states[1:]]


def torchvision_maps(model, x):
    """Return the maps of all stages: every second part of the network, after the patch embedding, is a stage."""
    maps, x = [], to_torch(x)
    for index, part in enumerate(model.features):
        x = part(x)
        if index % 2:
            maps.append(x)
    return maps


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 16])
def test_tiny_equals_timm(timm, window):
    # With windows of 16 the last map, of 8 x 8, clips them.
    reference = randomise(timm.create_model(f"swinv2_tiny_window{window}_256", pretrained=False))
    model = jaxlayers.create_model(f"swin_v2_tiny_window{window}_256")
    x = images(256, 256)[:1]
    logits, maps = run(model, swin_v2.from_reference(state(reference), model, source="timm"), x)
    assert_close(logits, reference(to_torch(x)), f"timm logits, window {window}")
    for stage, (found, expected) in enumerate(zip(maps, timm_maps(reference, x), strict=True)):
        assert_close(found, expected, f"timm stage {stage}, window {window}")


@torch.no_grad()
def test_tiny_equals_huggingface(transformers):
    config = transformers.Swinv2Config(image_size=256, window_size=8, num_labels=1000)
    reference = randomise(transformers.Swinv2ForImageClassification(config))
    model = jaxlayers.create_model("swin_v2_tiny_window8_256")
    x = images(256, 256)[:1]
    logits, maps = run(model, swin_v2.from_reference(state(reference), model, source="huggingface"), x)
    assert_close(logits, reference(to_torch(x)).logits, "Hugging Face logits")
    for stage, (found, expected) in enumerate(zip(maps, huggingface_maps(reference, x), strict=True)):
        assert_close(found, expected, f"Hugging Face stage {stage}")


@torch.no_grad()
def test_tiny_equals_torchvision(torchvision):
    reference = randomise(torchvision.models.swin_v2_t())
    model = jaxlayers.create_model("swin_v2_tiny_window8_256")
    x = images(256, 256)[:1]
    logits, maps = run(model, swin_v2.from_reference(state(reference), model, source="torchvision"), x)
    assert_close(logits, reference(to_torch(x)), "torchvision logits")
    for stage, (found, expected) in enumerate(zip(maps, torchvision_maps(reference, x), strict=True)):
        assert_close(found, expected, f"torchvision stage {stage}")


@pytest.mark.parametrize("name", [name for name in swin_v2.VARIANTS if "window12" in name])
def test_variants_have_as_many_parameters_as_those_of_timm(timm, name):
    classes = swin_v2.VARIANTS[name]["num_classes"]
    with torch.device("meta"):
        reference = timm.create_model(name.replace("swin_v2", "swinv2"), num_classes=classes)
    model = jaxlayers.create_model(name, scan=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *jaxlayers.abstract_inputs(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(one.numel() for one in reference.parameters())


SHAPE = {"embed_dim": 16, "depths": (2, 3), "num_heads": (2, 4)}
SMALL = SwinV2(num_classes=7, **SHAPE, window_size=5)


@pytest.fixture(scope="module")
def huggingface(transformers):
    config = transformers.Swinv2Config(
        num_labels=7, image_size=50, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=5
    )
    return randomise(transformers.Swinv2ForImageClassification(config))


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 67), (44, 96)])
def test_sizes_that_fit_neither_patch_nor_window_equal_huggingface(huggingface, size):
    x = images(*size)
    logits, maps = run(SMALL, swin_v2.from_reference(state(huggingface), SMALL, source="huggingface"), x)
    assert_close(logits, huggingface(to_torch(x)).logits)
    for found, expected in zip(maps, huggingface_maps(huggingface, x), strict=True):
        assert_close(found, expected)


@torch.no_grad()
def test_masking_the_padding_is_another_network(huggingface):
    # Negative control of the comparison above: at such sizes the option tells.
    x = images(50, 67)
    params = swin_v2.from_reference(state(huggingface), SMALL, source="huggingface")
    logits, _ = run(SMALL.clone(mask_padding=True), params, x)
    assert np.abs(logits - huggingface(to_torch(x)).logits.numpy()).max() > 1e-2


def test_files_that_huggingface_writes_can_be_read(huggingface, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    huggingface.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    expected = swin_v2.from_reference(state(huggingface), SMALL, source="huggingface")
    jax.tree.map(np.testing.assert_array_equal, swin_v2.from_reference(tensors, SMALL, source="huggingface"), expected)


@torch.no_grad()
def test_non_square_windows_and_padding_equal_torchvision(torchvision):
    parts = torchvision.models.swin_transformer
    reference = randomise(
        parts.SwinTransformer(
            patch_size=[4, 2],
            embed_dim=16,
            depths=[2, 3],
            num_heads=[2, 4],
            window_size=[5, 4],
            num_classes=7,
            block=parts.SwinTransformerBlockV2,
            downsample_layer=parts.PatchMergingV2,
        )
    )
    model = SMALL.clone(patch_size=(4, 2), window_size=(5, 4))
    x = images(52, 38)
    logits, maps = run(model, swin_v2.from_reference(state(reference), model, source="torchvision"), x)
    assert_close(logits, reference(to_torch(x)))
    for found, expected in zip(maps, torchvision_maps(reference, x), strict=True):
        assert_close(found, expected)


@torch.no_grad()
def test_a_window_grown_since_pre_training_equals_timm(timm):
    network = timm.models.swin_transformer_v2.SwinTransformerV2
    reference = randomise(network(img_size=64, window_size=8, pretrained_window_sizes=(4, 3), num_classes=7, **SHAPE))
    model = SMALL.clone(window_size=8, pretrained_window_size=((4, 4), (3, 3)))
    x = images(64, 64)
    params = swin_v2.from_reference(state(reference), model, source="timm")
    logits, _ = run(model, params, x)
    assert_close(logits, reference(to_torch(x)))
    # Negative control: without the window of pre-training it is another network.
    other, _ = run(model.clone(pretrained_window_size=None), params, x)
    assert np.abs(other - logits).max() > 1e-2


@torch.no_grad()
def test_windows_larger_than_the_map_equal_timm(timm):
    # Maps of 8 x 12, 4 x 6 and 2 x 3: windows that fit, that are the map, and that exceed it.
    shape = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "num_classes": 7, "window_size": (4, 6)}
    reference = randomise(timm.models.swin_transformer_v2.SwinTransformerV2(img_size=(32, 48), **shape))
    model = SwinV2(**shape)
    params = swin_v2.from_reference(state(reference), model, source="timm")
    logits, _ = run(model, params, images(32, 48))
    assert_close(logits, reference(to_torch(images(32, 48))))


def test_gradients_equal_timm(timm):
    network = timm.models.swin_transformer_v2.SwinTransformerV2
    reference = randomise(network(img_size=40, window_size=5, num_classes=7, **SHAPE))
    x = images(40, 40)
    params = swin_v2.from_reference(state(reference), SMALL, source="timm")
    pixels = jnp.asarray(x)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(SMALL.apply({"params": params}, pixels)))))(params)
    reference(to_torch(x)).sin().sum().backward()
    tensors = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    expected = flax.traverse_util.flatten_dict(swin_v2.from_reference(tensors, SMALL, source="timm"), sep="/")
    errors = {}
    for path, leaf in flax.traverse_util.flatten_dict(gradient, sep="/").items():
        # Each against its own size, so that a wrong small one cannot hide behind a large one.
        size = float(np.abs(expected[path]).max())
        assert size > 1e-4, f"the gradient of {path} would compare nothing"
        errors[path] = float(np.abs(leaf - expected[path]).max()) / size
    worst = max(errors, key=errors.get)
    print(f"gradient: max |error| / max |gradient| {errors[worst]:.1e} at {worst}")
    assert errors[worst] < 1e-4


def test_official_names_are_those_that_timm_converts(timm):
    reference = timm.models.swin_transformer_v2.SwinTransformerV2(img_size=40, window_size=5, num_classes=7, **SHAPE)
    tensors = reference.state_dict()
    params = swin_v2.from_reference(state(reference), SMALL, source="timm")
    official = {}
    for path in flax.traverse_util.flatten_dict(params, sep="/"):
        names = [reference_name(path, swin_v2.REFERENCE_NAMES[source]) for source in ("official", "timm")]
        names = [
            name.replace("qkv.query", "qkv").replace("qkv.key", "qkv").replace("qkv.value", "qkv") for name in names
        ]
        official[names[0]] = tensors[names[1]]
    assert "layers.0.downsample.reduction.weight" in official
    check_file({name: tensor.numpy() for name, tensor in official.items()}, SMALL, "official")
    converted = timm.models.swin_transformer_v2.checkpoint_filter_fn(official, reference)
    assert set(converted) == set(tensors)
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_weights_go_back_to_their_references(timm, torchvision, huggingface):
    network = timm.models.swin_transformer_v2.SwinTransformerV2
    check_file(state(network(img_size=40, window_size=5, num_classes=7, **SHAPE)), SMALL, "timm")
    check_file(state(huggingface), SMALL, "huggingface")
    parts = torchvision.models.swin_transformer
    reference = parts.SwinTransformer(
        patch_size=[4, 2],
        embed_dim=16,
        depths=[2, 3],
        num_heads=[2, 4],
        window_size=[5, 4],
        num_classes=7,
        block=parts.SwinTransformerBlockV2,
        downsample_layer=parts.PatchMergingV2,
    )
    tensors = state(reference)
    for name in tensors:
        if name.endswith("attn.qkv.bias"):
            # Its middle third, for the keys, is zeroed where it is used, and comes back as zeros.
            third = len(tensors[name]) // 3
            tensors[name] = np.concatenate([tensors[name][:third], np.zeros(third, np.float32), tensors[name][-third:]])
    check_file(tensors, SMALL.clone(patch_size=(4, 2), window_size=(5, 4)), "torchvision")
    with torch.device("meta"):
        named = timm.create_model("swinv2_tiny_window8_256", num_classes=3)
    assert ("swin_v2_tiny_window8_256", "timm") in guessed(named.state_dict())

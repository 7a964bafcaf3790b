"""Swin beside timm, Hugging Face transformers and torchvision, on the same random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.resample import cubic_matrix, resample_patch_kernel, resample_relative_table
from jaxlayers.window import Swin, swin
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


def randomise(model):
    """Draw every parameter at a scale at which it shows: fresh ones leave attention nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or "table" in name:
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
        return model.apply(variables, x), nn.apply(Swin.features, model)(variables, x)

    logits, levels = jax.jit(both)({"params": params}, jnp.asarray(x))
    return np.asarray(logits), [np.asarray(level.array) for level in levels]


def assert_close(found, expected, what=""):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def huggingface_maps(model, x):
    """Return the maps of all stages before their merging, channels last."""
    tokens, size = model.swin.embeddings(to_torch(x))
    out = model.swin.encoder(tokens, size, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    return [one.permute(0, 2, 3, 1) for one in out.reshaped_hidden_states[1:]]


TINY = Swin(**{key: value for key, value in swin.VARIANTS["swin_tiny"].items() if key not in ("module", "inputs")})


@torch.no_grad()
def test_swin_tiny_equals_timm_and_huggingface(timm, transformers):
    x = images(224, 224)[:1]
    compiled = jax.jit(lambda v, x: (TINY.apply(v, x), nn.apply(Swin.features, TINY)(v, x)))

    reference = randomise(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False))
    params = swin.from_reference(state(reference), TINY, source="timm")
    logits, levels = compiled({"params": params}, jnp.asarray(x))
    assert_close(logits, reference(to_torch(x)), "timm logits")
    maps = [one.permute(0, 2, 3, 1) for one in reference.forward_intermediates(to_torch(x), intermediates_only=True)]
    for level, expected in zip(levels, maps, strict=True):
        assert_close(level.array, expected, f"timm stage of stride {level.stride}")
        assert level.channels == expected.shape[-1]

    reference = randomise(transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000)))
    params = swin.from_reference(state(reference), TINY, source="huggingface_5")
    logits, levels = compiled({"params": params}, jnp.asarray(x))
    assert_close(logits, reference(to_torch(x)).logits, "Hugging Face logits")
    for level, expected in zip(levels, huggingface_maps(reference, x), strict=True):
        assert_close(level.array, expected, f"Hugging Face stage of stride {level.stride}")


SMALL = Swin(num_classes=7, embed_dim=16, depths=(2, 3), num_heads=(2, 4), window_size=5)


@pytest.fixture(scope="module")
def huggingface(transformers):
    config = transformers.SwinConfig(
        num_labels=7, image_size=50, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=5
    )
    return randomise(transformers.SwinForImageClassification(config))


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 67), (44, 96)])
def test_sizes_that_fit_neither_patch_nor_window_equal_huggingface(huggingface, size):
    x = images(*size)
    logits, maps = run(SMALL, swin.from_reference(state(huggingface), SMALL, source="huggingface_5"), x)
    assert_close(logits, huggingface(to_torch(x)).logits)
    for found, expected in zip(maps, huggingface_maps(huggingface, x), strict=True):
        assert_close(found, expected)


@torch.no_grad()
def test_masking_the_padding_is_another_network(huggingface):
    # Negative control of the comparison above: at such sizes the option tells.
    x = images(50, 67)
    params = swin.from_reference(state(huggingface), SMALL, source="huggingface_5")
    logits, _ = run(SMALL.clone(mask_padding=True), params, x)
    assert np.abs(logits - huggingface(to_torch(x)).logits.numpy()).max() > 1e-2


def test_files_that_huggingface_writes_can_be_read(huggingface, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    huggingface.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    source = "huggingface" if any(".self.query." in name for name in tensors) else "huggingface_5"
    expected = swin.from_reference(state(huggingface), SMALL, source="huggingface_5")
    jax.tree.map(np.testing.assert_array_equal, swin.from_reference(tensors, SMALL, source=source), expected)


@torch.no_grad()
def test_non_square_windows_and_padding_equal_torchvision(torchvision):
    reference = randomise(
        torchvision.models.swin_transformer.SwinTransformer(
            patch_size=[4, 2], embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=[5, 4], num_classes=7
        )
    )
    model = SMALL.clone(patch_size=(4, 2), window_size=(5, 4))
    x = images(52, 38)
    logits, _ = run(model, swin.from_reference(state(reference), model, source="torchvision"), x)
    assert_close(logits, reference(to_torch(x)))


@torch.no_grad()
def test_windows_larger_than_the_map_equal_timm(timm):
    # Maps of 8 x 12, 4 x 6 and 2 x 3: windows that fit, that are the map, and that exceed it.
    size = {"img_size": (32, 48), "window_size": (4, 6)}
    shape = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "num_classes": 7}
    reference = randomise(timm.models.swin_transformer.SwinTransformer(**size, **shape))
    # timm makes smaller tables there, so each stage says its window.
    model = Swin(**shape, window_size=((4, 6), (4, 6), (2, 3)))
    params = swin.from_reference(state(reference), model, source="timm")
    logits, _ = run(model, params, images(32, 48))
    assert_close(logits, reference(to_torch(images(32, 48))))
    headless, _ = run(model.clone(num_classes=0), swin.reset_classifier(params, jax.random.key(0), 0), images(32, 48))
    reference.reset_classifier(0)
    assert_close(headless, reference(to_torch(images(32, 48))))


def test_official_names_are_those_that_timm_converts(timm):
    reference = timm.models.swin_transformer.SwinTransformer(
        img_size=40, embed_dim=16, depths=(2, 3), num_heads=(2, 4), window_size=5, num_classes=7
    )
    tensors = reference.state_dict()
    params = swin.from_reference(state(reference), SMALL, source="timm")
    paths = flax.traverse_util.flatten_dict(params, sep="/")
    official = {swin.reference_name(path, "official"): tensors[swin.reference_name(path, "timm")] for path in paths}
    assert "layers.0.downsample.reduction.weight" in official
    check_file({name: tensor.numpy() for name, tensor in official.items()}, SMALL, "official")
    converted = timm.models.swin_transformer.checkpoint_filter_fn(official, reference)
    assert set(converted) == set(tensors)
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("source", "target"), [(13, 23), (23, 13), (7, 8), (5, 2)])
@pytest.mark.parametrize("antialias", [False, True])
def test_cubic_matrix_equals_torch(source, target, antialias):
    eye = torch.eye(source)[:, None, None]
    expected = torch.nn.functional.interpolate(eye, size=(1, target), mode="bicubic", antialias=antialias)
    np.testing.assert_allclose(cubic_matrix(source, target, antialias=antialias).T, expected[:, 0, 0], atol=1e-5)


@pytest.mark.parametrize(("window", "new_window"), [(7, (12, 12)), (12, (7, 7)), (4, (8, 6))])
def test_resized_tables_equal_timm(timm, window, new_window):
    from timm.layers import pos_embed_rel

    table = torch.randn((2 * window - 1) ** 2, 3, generator=torch.Generator().manual_seed(0))
    rows = (2 * new_window[0] - 1) * (2 * new_window[1] - 1)
    found = resample_relative_table(jnp.asarray(table.numpy()), (window, window), new_window)
    expected = pos_embed_rel.resize_rel_pos_bias_table_simple(table, new_window, (rows, 3))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # timm's other method spaces the source points geometrically; on a smooth table the two agree near the centre,
    # where attention is.
    axis = torch.linspace(-1, 1, 2 * window - 1)
    smooth = torch.exp(-(axis[:, None] ** 2) - axis[None] ** 2).reshape(-1, 1)
    geometric = pos_embed_rel.resize_rel_pos_bias_table(smooth, new_window, (rows, 1), (window, window))
    found = resample_relative_table(jnp.asarray(smooth.numpy()), (window, window), new_window)
    middle = rows // 2
    np.testing.assert_allclose(found[middle], geometric[middle], atol=0.02)


@pytest.mark.parametrize("new_patch", [(8, 8), (2, 2), (3, 6)])
def test_resized_patch_kernel_equals_timm(timm, new_patch):
    from timm.layers import resample_patch_embed

    kernel = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = resample_patch_embed(kernel, list(new_patch)).permute(2, 3, 1, 0)
    found = resample_patch_kernel(jnp.asarray(kernel.permute(2, 3, 1, 0).numpy()), new_patch)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_a_resized_network_equals_one_resized_by_torch(timm):
    from timm.layers import pos_embed_rel, resample_patch_embed

    shape = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 7}
    network = timm.models.swin_transformer.SwinTransformer
    reference = randomise(network(img_size=32, window_size=4, **shape))
    larger = network(img_size=48, window_size=3, patch_size=2, **shape).eval()
    tensors = dict(reference.state_dict())
    for name, tensor in tensors.items():
        if name.endswith("table"):
            tensors[name] = pos_embed_rel.resize_rel_pos_bias_table_simple(tensor, (3, 3), (25, tensor.shape[-1]))
    tensors["patch_embed.proj.weight"] = resample_patch_embed(tensors["patch_embed.proj.weight"], [2, 2])
    larger.load_state_dict(tensors)
    model = Swin(**shape, window_size=4)
    target = model.clone(window_size=3, patch_size=2)
    params = swin.resize(swin.from_reference(state(reference), model, source="timm"), model, target)
    logits, _ = run(target, params, images(48, 48))
    assert_close(logits, larger(to_torch(images(48, 48))))


def test_weights_go_back_to_their_references(timm, torchvision, huggingface):
    shape = {"embed_dim": 16, "depths": (2, 3), "num_heads": (2, 4), "num_classes": 7}
    network = timm.models.swin_transformer.SwinTransformer
    check_file(state(network(img_size=40, window_size=5, **shape)), SMALL, "timm")
    check_file(state(huggingface), SMALL, "huggingface_5")
    network = torchvision.models.swin_transformer.SwinTransformer
    reference = network(patch_size=[4, 2], window_size=[5, 4], **{**shape, "depths": [2, 3], "num_heads": [2, 4]})
    check_file(state(reference), SMALL.clone(patch_size=(4, 2), window_size=(5, 4)), "torchvision")
    with torch.device("meta"):
        named = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3)
    assert guessed(named.state_dict()) == [("swin_tiny", "timm")]


def test_files_that_huggingface_writes_go_back(huggingface, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    huggingface.save_pretrained(tmp_path)
    check_file(safetensors.load_file(tmp_path / "model.safetensors"), SMALL, "huggingface")

"""ConvNeXt and ConvNeXt V2 beside timm, Hugging Face transformers and torchvision, on the same random weights."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import summarize
from jaxlayers.conv import ConvNeXt, GlobalResponseNorm, convnext
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


def randomise(model):
    """Draw every parameter at a scale at which it shows: fresh layer scales and response norms leave nothing to see."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.squeeze().ndim < 2:
                parameter.copy_(0.3 * noise + 0.3)
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
    """Return logits and the maps of all stages."""
    both = jax.jit(lambda v, x: (model.apply(v, x), nn.apply(ConvNeXt.features, model)(v, x)))
    logits, levels = both({"params": params}, jnp.asarray(x))
    return logits, [level.array for level in levels]


def assert_close(found, expected, what):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    print(f"{what}: max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


def assert_maps_close(found, expected, what):
    for stage, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs.permute(0, 2, 3, 1), f"{what}, map {stage}")


def pad_strided(model):
    """Pad the inputs of every strided convolution with zeros at their ends, as we do, instead of dropping the rest."""

    def pad(module, inputs):
        ends = [-length % step for length, step in zip(inputs[0].shape[-2:], module.stride, strict=True)]
        return (torch.nn.functional.pad(inputs[0], (0, ends[1], 0, ends[0])),)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and max(module.stride) > 1:
            module.register_forward_pre_hook(pad)
    return model


def fields(name):
    return {key: value for key, value in convnext.VARIANTS[name].items() if key not in ("module", "inputs")}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "source", "size"),
    [
        ("convnext_tiny", "huggingface", 96),
        ("convnextv2_tiny", "huggingface_v2", 96),
        ("convnextv2_atto", "huggingface_v2", 224),
    ],
)
def test_named_variants_equal_timm_and_huggingface(timm, transformers, name, source, size):
    model = ConvNeXt(**fields(name))
    x = images(size, size)[:1]

    reference = randomise(timm.create_model(name, pretrained=False))
    params = convnext.from_reference(state(reference), model, source="timm")
    logits, maps = run(model, params, x)
    assert_close(logits, reference(to_torch(x)), "timm logits")
    assert_maps_close(maps, reference.forward_intermediates(to_torch(x), intermediates_only=True), "timm")

    version = "V2" if source.endswith("v2") else ""
    config = getattr(transformers, f"ConvNext{version}Config")(
        num_labels=1000, depths=list(model.depths), hidden_sizes=list(model.widths)
    )
    reference = randomise(getattr(transformers, f"ConvNext{version}ForImageClassification")(config))
    params = convnext.from_reference(state(reference), model, source=source)
    logits, maps = run(model, params, x)
    theirs = reference(to_torch(x), output_hidden_states=True)
    assert_close(logits, theirs.logits, "Hugging Face logits")
    assert_maps_close(maps, theirs.hidden_states[-4:], "Hugging Face")


SMALL = ConvNeXt(num_classes=7, depths=(2, 1, 2), widths=(12, 16, 20), layer_scale=1.0)


@torch.no_grad()
def test_a_network_equals_torchvision(torchvision):
    module = torchvision.models.convnext
    setting = [module.CNBlockConfig(12, 16, 2), module.CNBlockConfig(16, 20, 1), module.CNBlockConfig(20, None, 2)]
    reference = randomise(module.ConvNeXt(setting, num_classes=7))
    x = images(48, 80)
    logits, _ = run(SMALL, convnext.from_reference(state(reference), SMALL, source="torchvision"), x)
    assert_close(logits, reference(to_torch(x)), "torchvision logits")


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 67), (45, 96)])
def test_sizes_that_do_not_divide_equal_a_reference_that_pads(transformers, size):
    config = transformers.ConvNextV2Config(num_labels=7, num_stages=3, depths=[2, 1, 2], hidden_sizes=[12, 16, 20])
    reference = randomise(transformers.ConvNextV2ForImageClassification(config))
    model = SMALL.clone(layer_scale=None, response_norm=GlobalResponseNorm)
    params = convnext.from_reference(state(reference), model, source="huggingface_v2")
    x = images(*size)
    logits, maps = run(model, params, x)
    # As it is the reference drops what does not fill a stride, and gives another answer.
    assert np.abs(logits - reference(to_torch(x)).logits.numpy()).max() > 1e-3
    theirs = pad_strided(reference)(to_torch(x), output_hidden_states=True)
    assert_close(logits, theirs.logits, "logits")
    assert_maps_close(maps, theirs.hidden_states[-3:], "padded")


@torch.no_grad()
def test_masks_equal_a_reference_that_erases_hidden_pixels_in_every_block(timm):
    """The sparse encoder in dense words: hidden pixels are set to zero before each convolution and response norm."""
    reference = randomise(
        timm.create_model("convnextv2_atto", pretrained=False, num_classes=7, depths=(1, 2, 1, 1), dims=(8, 12, 16, 20))
    )
    model = ConvNeXt(**{**fields("convnextv2_atto"), "depths": (1, 2, 1, 1), "widths": (8, 12, 16, 20)})
    params = convnext.from_reference(state(reference), model.clone(num_classes=7), source="timm")
    x, mask = images(64, 96)[:1], np.array([[[True, False, True], [False, True, False]]])

    def erase(module, inputs):
        y = inputs[0]
        fine = torch.from_numpy(np.kron(mask[0], np.ones((y.shape[-2] // 2, y.shape[-1] // 3)))).float()
        return (y * fine,)

    for name, module in reference.named_modules():
        if name.endswith(("conv_dw", "grn")):
            module.register_forward_pre_hook(erase)
    maps = reference.forward_intermediates(to_torch(x), intermediates_only=True)
    apply = jax.jit(lambda v, x, mask: nn.apply(ConvNeXt.features, model.clone(num_classes=7))(v, x, mask))
    levels = apply({"params": params}, jnp.asarray(x), jnp.asarray(mask))
    for level, expected in zip(levels, maps, strict=True):
        fine = np.kron(mask[0], np.ones((level.array.shape[1] // 2, level.array.shape[2] // 3)))[None, ..., None]
        assert_close(level.array, expected.permute(0, 2, 3, 1).numpy() * fine, f"stride {level.stride}")


@pytest.mark.parametrize("name", sorted(convnext.VARIANTS))
def test_parameters_and_multiply_accumulates_equal_timm(timm, name):
    flops = pytest.importorskip("torch.utils.flop_counter")
    with torch.device("meta"):
        reference = timm.create_model(name, pretrained=False).eval()
    with flops.FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(torch.empty(1, 3, 224, 224, device="meta"))
    summary = summarize(ConvNeXt(**fields(name)), *convnext.VARIANTS[name]["inputs"])
    assert summary.parameters == sum(parameter.numel() for parameter in reference.parameters())
    ratio = summary.macs / (counter.get_total_flops() / 2)
    print(f"{name}: {summary.parameters:,} parameters, {summary.macs:,} MACs, {ratio:.4f} of timm's count")
    assert abs(ratio - 1) < 0.02


def test_official_names_are_those_that_timm_converts(timm):
    for version in ("convnext", "convnextv2"):
        shape = {"depths": (2, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 7}
        reference = timm.create_model(f"{version}_tiny", pretrained=False, **shape)
        model = ConvNeXt(
            **{**fields(f"{version}_tiny"), "depths": shape["depths"], "widths": shape["dims"], "num_classes": 7}
        )
        tensors = reference.state_dict()
        paths = flax.traverse_util.flatten_dict(
            convnext.from_reference(state(reference), model, source="timm"), sep="/"
        )
        official = {}
        for path in paths:
            names = [convnext.reference.reference_name(path, convnext.REFERENCE_NAMES[s]) for s in ("official", "timm")]
            tensor = tensors[names[1]]
            official[names[0]] = tensor[None, None, None] if ".grn." in names[0] else tensor
        check_file({name: tensor.numpy() for name, tensor in official.items()}, model, "official")
        converted = timm.models.convnext.checkpoint_filter_fn(official, reference)
        assert set(converted) == set(tensors)
        assert all(torch.equal(converted[name].reshape(tensors[name].shape), tensors[name]) for name in tensors)


def test_weights_go_back_to_their_references(timm, transformers, torchvision):
    shape = {"depths": (2, 1, 2, 1), "widths": (12, 16, 20, 24)}
    model = ConvNeXt(num_classes=7, **shape)
    second = model.clone(layer_scale=None, response_norm=GlobalResponseNorm)
    network = timm.models.convnext.ConvNeXt
    plain = network(depths=shape["depths"], dims=shape["widths"], num_classes=7)
    check_file(state(plain), model, "timm")
    normed = network(depths=shape["depths"], dims=shape["widths"], num_classes=7, use_grn=True, ls_init_value=None)
    check_file(state(normed), second, "timm")
    for ours, version, name in ((model, "", "huggingface"), (second, "V2", "huggingface_v2")):
        config = getattr(transformers, f"ConvNext{version}Config")(
            num_labels=7, depths=list(shape["depths"]), hidden_sizes=list(shape["widths"])
        )
        check_file(state(getattr(transformers, f"ConvNext{version}ForImageClassification")(config)), ours, name)
    parts = torchvision.models.convnext
    stages = zip(shape["widths"], (*shape["widths"][1:], None), shape["depths"], strict=True)
    reference = parts.ConvNeXt([parts.CNBlockConfig(*stage) for stage in stages], num_classes=7)
    check_file(state(reference), model, "torchvision")
    with torch.device("meta"):
        named = timm.create_model("convnextv2_atto", num_classes=3)
    assert guessed(named.state_dict()) == [("convnextv2_atto", "timm")]

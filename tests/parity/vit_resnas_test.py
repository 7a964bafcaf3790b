"""ViT-ResNAS beside the authors' code, run once with random parameters; its numbers are stored."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import vit_resnas
from jaxlayers.window.vit_resnas import Architecture, ResidualSpatialReduction, ViTResNAS, ViTResNASBlock

GOLDEN = Path(__file__).parent.parent / "golden" / "vit_resnas_parity.npz"
MODEL = ViTResNAS(
    num_classes=7,
    image_size=56,
    stem_features=8,
    embed_dim=(12, 16, 24),
    head_dim=(4, 6, 8),
    num_heads=((3, 3), (3,), (2, 2)),
    hidden_features=((20, 20), (24,), (40, 40)),
    patch_output=True,
    drop_path_rate=0.0,
)
# The sub-network that was cut out there, its second block left out.
SUB = Architecture((8, 14, 18), ((2, 0), (1,), (2, 1)), ((12, 0), (16,), (40, 24)))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "yilunliao/vit-search" in str(stored["provenance"])
        return dict(stored)


@pytest.fixture(scope="module")
def variables(golden):
    tensors = {
        name.removeprefix("parameter:"): value.astype(np.float32)
        for name, value in golden.items()
        if name.startswith("parameter:")
    }
    return vit_resnas.from_reference(tensors, MODEL)


def images(golden, name="images"):
    return jnp.moveaxis(jnp.asarray(golden[name], jnp.float32) / 32, 1, -1)


def check(found, expected, what, tolerance=1e-5):
    error = np.abs(np.asarray(found) - expected).max()
    print(f"{what}: max |error| {error:.1e}, max |value| {np.abs(expected).max():.2f}")
    assert np.shape(found) == expected.shape
    assert error < tolerance * np.abs(expected).max()


def test_every_module_equals_the_authors_code(golden, variables):
    params = variables["params"]

    def run(params, inputs):
        def embed(model, x):
            return model.patch_embed(x, deterministic=True)

        found = [MODEL.apply(variables, images(golden), method=embed).reshape(2, 16, 12)]
        for number, (stage, part) in enumerate(PARTS):
            x = inputs[number]
            own = params[f"stages_{stage}"][part]
            if part == "reduction":
                module = ResidualSpatialReduction(MODEL.embed_dim[stage])
                found.append(module.apply({"params": own}, x, size=(4 // 2 ** (stage - 1),) * 2))
            else:
                index = int(part[-1])
                heads, hidden = MODEL.num_heads[stage][index], MODEL.hidden_features[stage][index]
                found.append(ViTResNASBlock(heads, MODEL.head_dim[stage], hidden).apply({"params": own}, x))
        return found

    inputs = {number: jnp.asarray(golden[f"after:block_{number - 1}"]) for number in range(1, len(PARTS))}
    token = jnp.broadcast_to(params["class_token"], (2, 1, 12))
    inputs[0] = jnp.concatenate([token, golden["after:patch_embed"]], axis=1) + params["position_embedding"]
    found = jax.jit(run)(params, inputs)
    check(found[0], golden["after:patch_embed"], "patch_embed")
    for number, (stage, part) in enumerate(PARTS):
        check(found[number + 1], golden[f"after:block_{number}"], f"stages_{stage}/{part}")


PARTS = (
    (0, "blocks_0"),
    (0, "blocks_1"),
    (1, "reduction"),
    (1, "blocks_0"),
    (2, "reduction"),
    (2, "blocks_0"),
    (2, "blocks_1"),
)


def test_logits_and_maps_equal_the_authors_code(golden, variables):
    x = images(golden)
    both = jax.jit(lambda v, x: (MODEL.apply(v, x), nn.apply(ViTResNAS.features, MODEL)(v, x)))
    (logits, of_patches), levels = both(variables, x)
    check(logits, golden["logits"], "logits")
    check(of_patches, golden["patch_logits"], "logits of the patches")
    for index, (level, number) in enumerate(zip(levels, (1, 3, 6), strict=True)):
        expected = golden[f"after:block_{number}"][:, 1:]
        check(level.array.reshape(expected.shape), expected, f"map {index}")
    assert np.std(golden["logits"]) > 0.1
    # Without the patches' head the same checkpoint serves.
    plain = MODEL.clone(patch_output=False)
    tensors = {name.removeprefix("parameter:"): value for name, value in golden.items() if "parameter:" in name}
    fewer = vit_resnas.from_reference(tensors, plain)
    assert set(variables["params"]) - set(fewer["params"]) == {"patch_head"}


def test_sub_network_equals_the_authors_whether_cut_or_masked(golden, variables):
    sub = vit_resnas.sub_network(MODEL, SUB)
    params = vit_resnas.slice_params(variables["params"], MODEL, sub)
    cut, _ = jax.jit(sub.apply)({**variables, "params": params}, images(golden))
    masked, _ = jax.jit(MODEL.apply)(variables, images(golden), SUB)
    check(cut, golden["sub_logits"], "cut")
    check(masked, golden["masked_logits"], "masked")
    # It is another network.
    assert np.abs(golden["sub_logits"] - golden["logits"]).max() > 1


def test_order_of_importance_is_the_authors(golden, variables):
    found = vit_resnas.sort_by_importance(variables["params"], MODEL)
    for number, stage, index in ((0, 0, 0), (5, 2, 0)):
        block = found[f"stages_{stage}"][f"blocks_{index}"]
        name = f"rewired:blocks.{number}"
        biases = [block["attention"][part]["bias"] for part in ("query", "key", "value")]
        np.testing.assert_array_equal(np.concatenate(biases), golden[f"{name}.attn.qkv.bias"])
        np.testing.assert_array_equal(block["attention"]["out"]["kernel"].T, golden[f"{name}.attn.proj.weight"])
        np.testing.assert_array_equal(block["feed_forward"]["up"]["bias"], golden[f"{name}.mlp.fc1.bias"])
        # Not the order they were in.
        assert np.any(golden[f"{name}.mlp.fc1.bias"] != golden[f"parameter:blocks.{number}.mlp.fc1.bias"])


def test_larger_images_with_resampled_positions_equal_the_authors_code(golden, variables):
    large = MODEL.clone(image_size=112)
    params = vit_resnas.resize(variables["params"], MODEL, large)
    logits, _ = jax.jit(large.apply)({**variables, "params": params}, images(golden, "large_images"))
    check(logits, golden["large_logits"], "logits at 112 x 112", 1e-4)

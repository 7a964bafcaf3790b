import struct
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.testing import BadInput, Case
from jaxlayers.window import s2lic
from jaxlayers.window.s2lic import S2LIC, Codec
from jaxlayers.window.s2lic_entropy import FactorizedPrior
from jaxlayers.window.swin_v2 import SwinV2Block
from tests.window.s2lic_entropy_test import GOLDEN, random_params

TINY = S2LIC(
    features=4,
    latent_features=8,
    num_slices=2,
    depths=(1,),
    num_heads=(2,),
    window_size=4,
    mlp_ratio=1.0,
    enhance_features=2,
    head_dim=4,
    drop_path_rate=0.0,
)
KEY_BIAS = {
    r"key/bias$": "it adds one number to all logits of a query, which the softmax takes out",
}

CASES = (
    Case(
        name="s2lic",
        # Larger kernels than usual: with nearly no latents most of the entropy model would get nearly no gradient.
        module=TINY.clone(kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "uniform")),
        inputs=lambda rng: (rng.uniform(size=(2, 16, 13, 3)),),
        leading_axes=True,
        zero_gradients=KEY_BIAS,
        # In bfloat16 some latents round to the next whole number: 0.09 at the worst pixel, 0.001 at half of them.
        bfloat16_tolerance=0.15,
        bad_inputs=(
            BadInput(match=r"depths=\(1,\) and num_heads=\(2, 2\) must", module=TINY.clone(num_heads=(2, 2))),
            BadInput(match="enhance_features=-1 not negative", module=TINY.clone(enhance_features=-1)),
            BadInput(match="features=8 must be divisible by num_slices=3", module=TINY.clone(num_slices=3)),
            BadInput(match="with pixels; got .* set channels", inputs=lambda rng: (np.ones((1, 8, 8, 2)),)),
            BadInput(match="with pixels; got", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
        ),
    ),
)


@pytest.fixture(scope="module")
def codec():
    """A codec with random parameters, whose latents are of the size that its distributions expect."""
    params = random_params(TINY, jnp.ones((1, 16, 16, 3)), seed=3)
    params["down_1"] = jax.tree.map(lambda leaf: 0.2 * leaf, params["down_1"])
    params["prior"] = FactorizedPrior().init(jax.random.key(0), jnp.ones((1, TINY.features)))["params"]
    return Codec(TINY, params)


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return np.clip(128 + 60 * rng.normal(size=(93, 80, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def coded(codec, picture):
    return codec.encode(picture)


@pytest.fixture(scope="module")
def estimated(codec, picture):
    x = jnp.asarray(picture, jnp.float32)[None] / 255
    return jax.jit(codec.model.apply)(codec._variables, x)


def test_file_decodes_to_the_pictures_that_the_model_makes(codec, picture, coded, estimated):
    found = codec.decode(coded)
    assert found.shape == picture.shape
    assert found.dtype == np.uint8
    expected = np.clip(np.asarray(estimated.picture[0]), 0, 1) * 255
    # Half a level by rounding to whole ones.
    assert np.abs(found - expected).max() < 0.51
    assert np.ptp(found) > 10, "something must be in the picture"


def test_file_is_as_long_as_the_model_says(coded, estimated):
    header = s2lic._HEADER.size + 4
    wanted = float(estimated.bits[0]) / 8
    assert wanted > 500
    assert abs(len(coded) - header - wanted) < 0.02 * wanted + 8, (len(coded) - header, wanted)


def test_decoder_repeats_the_steps_of_the_coder_to_the_last_bit(codec, picture, monkeypatch):
    seen = []
    run = Codec._run

    def recorded(self, symbols, shape, code):
        def noted(channels, places, means, indexes):
            found = code(channels, places, means, indexes)
            seen[-1] += [means.copy(), indexes.copy(), np.array(found)]
            return found

        seen.append([np.array(symbols)])
        decoded = run(self, symbols, shape, noted)
        seen[-1].append(np.asarray(decoded))
        return decoded

    monkeypatch.setattr(Codec, "_run", recorded)
    codec.decode(codec.encode(picture))
    coder, decoder = seen
    assert len(coder) == 2 + 3 * 4
    for one, two in zip(coder, decoder, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(np.any(one != 0) for one in coder[3::3])


def test_another_device_decodes_the_same(codec, picture, coded):
    there = jax.devices()[3]
    with jax.default_device(there):
        other = Codec(codec.model, jax.device_put(codec._variables["params"], there))
        found = other.decode(coded)
    np.testing.assert_array_equal(found, codec.decode(coded))


def test_wild_parameters_lose_nothing(codec, picture):
    """Latents far beyond every table: what comes back is still what went in."""
    params = jax.tree.map(lambda leaf: leaf, codec._variables["params"])
    params["down_1"] = {**params["down_1"], "kernel": 15000 * params["down_1"]["kernel"]}
    wild = Codec(TINY, params)
    small = picture[:20, :20]
    y, _ = wild._analyse(wild._variables, jnp.asarray(small, jnp.float32)[None] / 255)
    assert np.abs(y).max() > 5000
    assert wild.decode(wild.encode(small)).shape == small.shape


def refused(codec, data, match):
    with pytest.raises(ValueError, match=match):
        codec.decode(data)


def test_damaged_and_foreign_files_are_refused(codec, coded):
    for place in range(0, len(coded), max(1, len(coded) // 60)):
        damaged = bytearray(coded)
        damaged[place] ^= 4
        refused(codec, bytes(damaged), "start as a file of S2LIC|damaged")
    for length in (0, 3, 20, len(coded) - 1):
        refused(codec, coded[:length], "start as a file of S2LIC|damaged")
    refused(codec, coded + b"\0", "damaged")
    refused(codec, b"\x89PNG" + coded[4:], "start as a file")
    other = Codec.__new__(Codec)
    other.__dict__ |= codec.__dict__ | {"digest": b"elsewise"}
    refused(other, coded, "encoded by model .* pass its parameters")


def forged(coded, **changes):
    """A file whose header says something else, with a checksum that fits."""
    names = ("magic", "version", "height", "width", "digest", "checksum")
    fields = dict(zip(names, s2lic._HEADER.unpack_from(coded), strict=True)) | changes
    head = s2lic._HEADER.pack(*fields.values())
    payload = coded[s2lic._HEADER.size + 4 :]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def test_headers_that_fit_no_picture_are_refused(codec, coded):
    np.testing.assert_array_equal(codec.decode(forged(coded)), codec.decode(coded))
    refused(codec, forged(coded, version=2), "version 2 must be 1")
    refused(codec, forged(coded, height=65535, width=65535), "must have 1 to 67108864 pixels")
    refused(codec, forged(coded, height=0), "must have 1 to")
    refused(codec, forged(coded, height=10, width=10), "damaged or of other tables|must compute what")
    refused(codec, forged(coded, checksum=1), "this machine must compute what the encoding one did")


def test_digest_names_fields_and_parameters(codec):
    params = codec._variables["params"]
    assert Codec(TINY, params).digest == codec.digest
    assert Codec(TINY.clone(window_size=2), params).digest != codec.digest
    changed = {**params, "down_0": {**params["down_0"], "bias": params["down_0"]["bias"].at[0].add(1e-6)}}
    assert Codec(TINY, changed).digest != codec.digest
    assert Codec(TINY.clone(remat="full"), params).digest == codec.digest


def test_wrong_pictures_are_refused(codec):
    for wrong in (np.ones((8, 8, 3)), np.ones((8, 8), np.uint8), np.ones((8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 \[height, width, 3\]; convert"):
            codec.encode(wrong)
    with pytest.raises(ValueError, match="sides from 1 to 65535"):
        codec.encode(np.ones((0, 8, 3), np.uint8))
    broken = Codec(TINY, jax.tree.map(lambda leaf: leaf, codec._variables["params"]))
    broken._variables = {"params": {**codec._variables["params"], "down_1": {"kernel": jnp.nan, "bias": jnp.nan}}}
    broken._analyse = lambda variables, x: (np.full((1, 4, 4, 8), np.nan), np.zeros((1, 1, 1, 4)))
    with pytest.raises(ValueError, match="finite numbers"):
        broken.encode(np.ones((8, 8, 3), np.uint8))


def test_training_counts_bits_of_noise_and_reaches_every_part(codec):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 16, 16, 3)), jnp.float32)
    params = codec._variables["params"]

    @jax.jit
    def bits(key):
        return TINY.apply({"params": params}, x, deterministic=False, rngs={"noise": key}).bits[0]

    one, again, two = (float(bits(jax.random.key(seed))) for seed in (0, 0, 1))
    assert one == again != two
    assert abs(one - two) < 0.3 * one


def test_remat_is_in_the_program():
    x = jnp.ones((1, 16, 16, 3))
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), x)

    def text(model):
        return str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, x).picture.sum()))(shapes))

    assert "remat" in text(TINY.clone(remat="full"))
    assert "remat" not in text(TINY)


def test_published_sizes():
    model = S2LIC()
    assert (model.stride, model.depths, model.num_heads) == (16, (1, 2, 3), (4, 8, 16))
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    # Widths that the public code fixes by what it hands to each part.
    gaussian, residual = (
        shapes["entropy_model"][f"{name}_{step}"]["convolution1"]["kernel"].shape
        for name, step in (("gaussian", 18), ("residual", 18))
    )
    assert gaussian[2:] == (320 * 2 + 32 * 3, 320)
    assert residual[2:] == (320 + 10 * 32, 224)
    dense = sum(leaf.size for name in ("enhance", "restore") for leaf in jax.tree.leaves(shapes[name]))
    # Twice two dense blocks of growth 32 (3 to 64, 64 to 3), and convolutions of 1, 3 and 1 between them.
    growth = sum(9 * (3 + 32 * k) * 32 + 32 for k in range(4)) + 9 * (3 + 128) * 64 + 64
    shrink = sum(9 * (64 + 32 * k) * 32 + 32 for k in range(4)) + 9 * (64 + 128) * 3 + 3
    assert dense == 2 * (growth + shrink + 2 * (64 * 64 + 64) + 9 * 64 * 64 + 64)


def test_blocks_are_the_public_ones_and_attend_to_the_whole_map_in_one_window():
    block = SwinV2Block(2, window_size=4, mlp_ratio=1.0)
    seen = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, SwinV2Block) and context.method_name == "__call__":
            seen.append(context.module.shift_size)
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(TINY.clone(depths=(3,)).init, jax.random.key(0), jnp.ones((1, 16, 16, 3)))
    assert seen == [0, 2, 0] * 2
    # One window: dense cosine attention, which does not care for the order of rows but for the position bias.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 4)), jnp.float32)
    params = random_params(block, x)
    jacobian = jax.jacobian(lambda x: block.apply({"params": params}, x))(x)[0, :, :, :, 0]
    assert np.all(np.abs(jacobian).max(axis=(2, 5)) > 0)


def test_dense_blocks_equal_those_of_invcompress():
    """Golden arrays of `EnhBlock`, see the docstring of the entropy model's tests."""
    with np.load(GOLDEN) as stored:
        golden = dict(stored)
    tree = {}
    for name, value in golden.items():
        parts = name.split(".")
        if parts[0] == "enhance/layers":
            part = {"0": "widen", "4": "narrow"}.get(parts[1])
            place = (part, parts[2].replace("conv", "convolution")) if part else (f"convolution{parts[1]}",)
            leaf = value if parts[-1] == "bias" else value.transpose(2, 3, 1, 0)
            branch = tree
            for one in place:
                branch = branch.setdefault(one, {})
            branch[parts[-1].replace("weight", "kernel")] = leaf
    found = s2lic._Enhance(8, {}).apply({"params": tree}, jnp.asarray(golden["enhance/x"]))
    np.testing.assert_allclose(found, golden["enhance/out"], rtol=1e-5, atol=1e-5)

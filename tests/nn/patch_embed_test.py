import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.patch_embed import PatchEmbed
from jaxlayers.testing import BadInput, Case

CASES = (
    Case(
        name="patch_embed",
        module=PatchEmbed(features=6, patch_size=(2, 3), norm=functools.partial(nn.LayerNorm, epsilon=1e-5)),
        inputs=lambda rng: (rng.normal(size=(2, 5, 6, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"features=0 and patch_size=\(2, 2\) must be positive", module=PatchEmbed(0, (2, 2))),
            BadInput(match="dtype int32 must be of floating point", inputs=lambda rng: (np.ones((1, 4, 6, 3), int),)),
            BadInput(match=r"needs at least 3 axes; got shape \(4, 3\)", inputs=lambda rng: (np.ones((4, 3)),)),
        ),
    ),
)


@pytest.mark.parametrize(("size", "patch"), [((12,), (4,)), ((7, 6), (3, 2)), ((4, 3, 5), (2, 2, 2))])
def test_equals_a_convolution_of_the_padded_input(rng, size, patch):
    layer = PatchEmbed(features=5, patch_size=patch)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    kernel = rng.normal(size=(*patch, 3, 5)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32)
    params = {"projection": {"kernel": jnp.asarray(kernel.reshape(-1, 5)), "bias": jnp.asarray(bias)}}
    found = layer.apply({"params": params}, x)
    padded = np.pad(x, [(0, 0), *((0, -length % step) for length, step in zip(size, patch, strict=True)), (0, 0)])
    axes = "DHW"[-len(size) :]
    expected = jax.lax.conv_general_dilated(
        padded, kernel, patch, "VALID", dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C")
    )
    np.testing.assert_allclose(found, expected + bias, atol=1e-4)


def test_translation_by_a_patch_moves_the_tokens(rng):
    layer = PatchEmbed(features=5, patch_size=(2, 2))
    x = jnp.asarray(rng.normal(size=(1, 6, 6, 3)), jnp.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    tokens = np.asarray(layer.apply(variables, x))
    moved = np.asarray(layer.apply(variables, jnp.roll(x, 2, axis=1)))
    np.testing.assert_allclose(moved, np.roll(tokens, 1, axis=1), atol=1e-6)
    # Negative control: by less than a patch it does not.
    assert np.abs(np.asarray(layer.apply(variables, jnp.roll(x, 1, axis=1))) - np.roll(tokens, 1, axis=1)).max() > 0.1
